"""Engine against plain passes on the inputs of a finished run: are their results equal, and what does each cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from stg_engine.config import STGConfig
from stg_engine.denoiser import Denoiser
from stg_engine.models import ModelSpec, spec_of
from stg_engine.reference import three_passes

STEPS, ROUNDS = 4, 5
# Two results that differ only by rounding differ by about as much as the noise measured below; 2 is the margin.
MARGIN = 2.0


@dataclass(frozen=True)
class Step:
    """The inputs of one denoising step, split as `Denoiser` takes them."""

    shared: Mapping[str, Any]
    cond: Mapping[str, Any]
    uncond: Mapping[str, Any] | None
    guidance_scale: float
    progress: float
    sigma: float


@dataclass(frozen=True)
class Comparison:
    """Seconds are medians per step of `samples` interleaved runs each.

    one_by_one_seconds, one_batch_seconds   plain passes as calls of their own, and as one call on all rows
    error     largest |engine - plain| / |plain| over the steps, L2 norms of the guided prediction
    rounding  the same for plain passes whose latents are changed by one unit in the last place
    """

    passes: int
    engine_seconds: float
    one_by_one_seconds: float
    one_batch_seconds: float
    samples: int
    error: float
    rounding: float

    @property
    def is_equal(self) -> bool:
        """True if engine and plain passes differ by rounding alone."""
        return self.error <= MARGIN * self.rounding

    @property
    def speedup(self) -> float | None:
        """The faster form of the plain passes over the engine; None if their results are not equal."""
        if not self.is_equal:
            return None
        return min(self.one_by_one_seconds, self.one_batch_seconds) / self.engine_seconds

    def __str__(self) -> str:
        times = (
            f"guided prediction, seconds per step, median of {self.samples} interleaved: "
            f"engine {self.engine_seconds:.4f}; {self.passes} plain passes {self.one_by_one_seconds:.4f} one by one, "
            f"{self.one_batch_seconds:.4f} in one batch"
        )
        if self.speedup is not None:
            times += f"; {self.speedup:.2f}x against the faster"
        verdict = "equal but for rounding" if self.is_equal else "NOT EQUAL, so no speed-up is stated"
        return (
            f"{times}\nparity: relative difference {self.error:.1e}; moving the latents by one unit in the last place "
            f"makes {self.rounding:.1e}: {verdict}"
        )


def recorded_steps(config: STGConfig, steps: int, sigmas: list[float]) -> list[int]:
    """At most STEPS step numbers, evenly spread over those whose skips are on. ValueError if there are none."""
    active = [i for i in range(steps) if config.at(i / steps, sigmas[i]).skips]
    if not active:
        raise ValueError("compare: no step has its skips on, so there is nothing to compare")
    count = min(STEPS, len(active))
    return sorted({active[round(i * (len(active) - 1) / max(1, count - 1))] for i in range(count)})


def steps_of(
    spec: ModelSpec, calls: Mapping[int, Mapping[str, Any]], steps: int, sigmas: list[float], guidance_scale: float
) -> list[Step]:
    """A pipeline's transformer calls {step number: arguments} on rows [uncond, cond], or [cond] if g <= 1, as `Step`s.

    All steps hold the same prompt tensors, as in the run itself, so that the engine may keep what follows from them.
    """
    first = next(iter(calls.values()))
    videos = len(first[spec.latents[0]]) // (2 if guidance_scale > 1 else 1)
    prompt = {name: value for name, value in first.items() if name in spec.prompt}
    cond = {name: value if value is None else value[-videos:] for name, value in prompt.items()}
    uncond = {name: value if value is None else value[:videos] for name, value in prompt.items()}
    result = []
    for index, call in calls.items():
        shared = {name: value for name, value in call.items() if name not in (*spec.prompt, "return_dict")}
        shared.update({name: shared[name][-videos:] for name in spec.latents if shared.get(name) is not None})
        result.append(
            Step(shared, cond, uncond if guidance_scale > 1 else None, guidance_scale, index / steps, sigmas[index])
        )
    return result


@torch.no_grad()
def compare(transformer: torch.nn.Module, config: STGConfig, steps: list[Step], **engine: Any) -> Comparison:
    """Run every step with a Denoiser (arguments `engine`) and as plain passes of the untouched transformer.

    In each of ROUNDS rounds the engine's steps follow the plain ones, so that a machine that slows down slows both.
    The engine's first call of a round is not timed: it computes what is kept for a whole generation.
    """
    latents = spec_of(transformer).latents[0]
    device = steps[0].shared[latents].device

    def plain(step: Step, **options: Any) -> torch.Tensor:
        inputs = (dict(step.shared), dict(step.cond), None if step.uncond is None else dict(step.uncond))
        options.update(progress=step.progress, sigma=step.sigma)
        return three_passes(transformer, config, *inputs, step.guidance_scale, **options)

    def guided(denoiser: Denoiser, step: Step) -> torch.Tensor:
        at = {"progress": step.progress, "sigma": step.sigma}
        scheduled = config.at(**at).guidance_scale
        uncond = step.uncond if scheduled is None or scheduled > 1 else None  # as the attached engine does
        return denoiser(
            step.shared, step.cond, uncond, guidance_scale=None if uncond is None else step.guidance_scale, **at
        )

    expected = [plain(step) for step in steps]
    nudged = [plain(replace(step, shared={**step.shared, latents: _nudge(step.shared[latents])})) for step in steps]
    with Denoiser(transformer, config, **engine) as denoiser:
        results = [guided(denoiser, step) for step in steps]
    one_by_one, one_batch, engine_seconds = [], [], []
    for _ in range(ROUNDS):
        one_by_one += [_seconds(device, partial(plain, step)) for step in steps]
        one_batch += [_seconds(device, partial(plain, step, one_batch=True)) for step in steps]
        with Denoiser(transformer, config, **engine) as denoiser:
            guided(denoiser, steps[0])
            engine_seconds += [_seconds(device, partial(guided, denoiser, step)) for step in steps]
    skips = max(len(config.at(step.progress, step.sigma).skips) for step in steps)
    return Comparison(
        passes=skips + (1 if steps[0].uncond is None else 2),
        engine_seconds=median(engine_seconds),
        one_by_one_seconds=median(one_by_one),
        one_batch_seconds=median(one_batch),
        samples=len(engine_seconds),
        error=max(_distance(a, b) for a, b in zip(results, expected, strict=True)),
        rounding=max(_distance(a, b) for a, b in zip(nudged, expected, strict=True)),
    )


def _nudge(latents: torch.Tensor) -> torch.Tensor:
    """Every value moved by one unit in the last place, up or down at random (fixed seed)."""
    signs = torch.randint(0, 2, latents.shape, generator=torch.Generator().manual_seed(0)).to(latents) * 2 - 1
    return latents + signs * latents.abs() * torch.finfo(latents.dtype).eps


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
