"""Engine against plain passes on the inputs of a finished run: are their results equal, and what does each cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from stg_engine.config import STGConfig
from stg_engine.denoiser import Denoiser
from stg_engine.inputs import split_rows
from stg_engine.models import spec_of
from stg_engine.reference import Call, moved_block_inputs, three_passes

STEPS, ROUNDS = 4, 5
# Two results that differ only by rounding differ by about as much as the noise measured below; 2 is the margin.
MARGIN = 2.0


@dataclass(frozen=True)
class Step:
    """The inputs of one denoising step, split as `Denoiser` takes them, and the model that got them.

    sigma  None where the config does not ask for it
    """

    transformer: torch.nn.Module
    shared: Mapping[str, Any]
    cond: Mapping[str, Any]
    uncond: Mapping[str, Any] | None
    guidance_scale: float
    progress: float
    sigma: float | None


@dataclass(frozen=True)
class Comparison:
    """What the engine and plain passes gave and took for the same steps.

    passes    plain passes per step
    engine, one_by_one, one_batch   seconds per step, interleaved samples; plain passes as calls of their own and as one
              call on all rows
    error     largest |engine - plain| / |plain| over the steps, L2 norms of the guided prediction
    rounding  the same for plain passes in which every block's input is moved by one unit in the last place
    """

    passes: int
    engine: list[float]
    one_by_one: list[float]
    one_batch: list[float]
    error: float
    rounding: float

    @property
    def is_equal(self) -> bool:
        """True if engine and plain passes differ by rounding alone."""
        return self.error <= MARGIN * self.rounding

    @property
    def speedup(self) -> float | None:
        """Median seconds, the faster form of the plain passes over the engine; None if their results are not equal."""
        plain = min(median(self.one_by_one), median(self.one_batch))
        return plain / median(self.engine) if self.is_equal else None

    def __str__(self) -> str:
        rows = (
            ("engine", self.engine),
            (f"{self.passes} plain passes, one by one", self.one_by_one),
            (f"{self.passes} plain passes, in one batch", self.one_batch),
        )
        lines = [f"guided prediction, seconds per step: median (quartiles) of {len(self.engine)} interleaved samples"]
        for name, samples in rows:
            low, middle, high = quantiles(samples, n=4) if len(samples) > 1 else samples * 3
            lines.append(f"  {name:<28} {middle:.4f} ({low:.4f} to {high:.4f})")
        if self.speedup is not None:
            lines.append(f"  engine against the faster    {self.speedup:.2f}x")
        lines.append(f"  relative difference          {self.error:.1e}, {self._verdict()}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        cause = f"moving every block's input by one unit in the last place makes {self.rounding:.1e}"
        return f"rounding: {cause}" if self.is_equal else f"NOT EQUAL, so no speed-up is stated: {cause}"


def noise_levels(pipe: Any, config: STGConfig) -> list[float | None]:
    """Per step of the pipeline's last call sigma, or None where the config does not ask for it."""
    count = pipe.num_timesteps
    return pipe.scheduler.sigmas[-count - 1 : -1].tolist() if config.needs_sigma else [None] * count


def recorded_steps(config: STGConfig, sigmas: Sequence[float | None]) -> list[int]:
    """At most STEPS step numbers, evenly spread over those whose skips are on. ValueError if there are none."""
    active = [i for i, sigma in enumerate(sigmas) if config.at(i / len(sigmas), sigma).skips]
    if not active:
        raise ValueError("compare: no step has its skips on, so there is nothing to compare")
    count = min(STEPS, len(active))
    return sorted({active[round(i * (len(active) - 1) / max(1, count - 1))] for i in range(count)})


def steps_of(calls: Mapping[int, Sequence[Call]], sigmas: Sequence[float | None], guidance_scale: float) -> list[Step]:
    """A pipeline's calls {step number: calls} as `Step`s.

    A step is one call on rows [uncond, cond], or [cond] if g <= 1, or a call for cond and one for uncond. All steps of
    a model hold the same prompt tensors, as in the run itself, so that the engine may keep what follows from them.
    """
    prompts: dict[torch.nn.Module, tuple[Mapping[str, Any], Mapping[str, Any] | None]] = {}
    result = []
    for index, ((model, arguments), *others) in calls.items():
        copies = 2 if guidance_scale > 1 and not others else 1
        shared, cond, uncond = split_rows(spec_of(model), arguments, copies)
        for _, negative in others:
            _, uncond, _ = split_rows(spec_of(model), negative, 1)
        shared.pop("return_dict", None)
        prompt = prompts.setdefault(model, (cond, uncond))
        result.append(Step(model, shared, *prompt, guidance_scale, index / len(sigmas), sigmas[index]))
    return result


@torch.no_grad()
def compare(config: STGConfig, steps: list[Step], **engine: Any) -> Comparison:
    """Run every step with a Denoiser (arguments `engine`) and as plain passes of its untouched transformer.

    Timed in turns, each step ROUNDS times, so that a machine that slows down slows all of them. Each timed call of the
    engine follows one that is not timed, which computes what is kept for a whole generation.
    """
    models = list(dict.fromkeys(step.transformer for step in steps))
    device = next(models[0].parameters()).device

    def plain(step: Step, **options: Any) -> torch.Tensor:
        inputs = (dict(step.shared), dict(step.cond), None if step.uncond is None else dict(step.uncond))
        options.update(progress=step.progress, sigma=step.sigma)
        return three_passes(step.transformer, config, *inputs, step.guidance_scale, **options)

    def guided(denoiser: Denoiser, step: Step) -> torch.Tensor:
        at = {"progress": step.progress, "sigma": step.sigma}
        g = None if step.uncond is None else step.guidance_scale
        return denoiser(step.shared, step.cond, step.uncond, guidance_scale=g, **at)

    expected = [plain(step) for step in steps]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(moved_block_inputs(model))
        moved = [plain(step) for step in steps]
    with ExitStack() as stack:
        denoisers = {model: stack.enter_context(Denoiser(model, config, **engine)) for model in models}
        results = [guided(denoisers[step.transformer], step) for step in steps]
    samples: dict[str, list[float]] = {"engine": [], "one_by_one": [], "one_batch": []}
    for step in steps * ROUNDS:
        samples["one_by_one"].append(_seconds(device, partial(plain, step)))
        samples["one_batch"].append(_seconds(device, partial(plain, step, one_batch=True)))
        with Denoiser(step.transformer, config, **engine) as denoiser:
            guided(denoiser, step)
            samples["engine"].append(_seconds(device, partial(guided, denoiser, step)))
    skips = max(len(config.at(step.progress, step.sigma).names) for step in steps)
    return Comparison(
        passes=skips + (1 if steps[0].uncond is None else 2),
        error=max(_distance(a, b) for a, b in zip(results, expected, strict=True)),
        rounding=max(_distance(a, b) for a, b in zip(moved, expected, strict=True)),
        **samples,
    )


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """`|a - b| / |b|`, L2; infinite if `a` is not finite."""
    distance = float((a.double() - b.double()).norm() / b.double().norm())
    return distance if distance == distance else float("inf")


def _seconds(device: torch.device, function: Callable[[], object]) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
