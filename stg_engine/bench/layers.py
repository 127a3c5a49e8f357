"""What skipping a layer costs and changes, measured on the noise levels of a pipeline's own run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from stg_engine.arguments import guidance_arguments, models_of
from stg_engine.bench import timing
from stg_engine.bench.case import Case
from stg_engine.compare import Step, recorded_steps, steps_of
from stg_engine.config import StepGuidance, STGConfig
from stg_engine.demo.data import ClipSpec
from stg_engine.demo.evaluate import PARTS, captions_of, generate, score
from stg_engine.denoiser import Denoiser
from stg_engine.models import spec_of
from stg_engine.plan import Plan
from stg_engine.reference import Call, recorded_calls
from stg_engine.settings import Model, Setting

__all__ = ["captions_of", "judge", "measure", "model_of_case", "steps_of_case", "steps_of_run"]

NO_GUIDANCE, CFG = "no guidance", "CFG alone"
SAMPLES = 8
"""Rounds at least."""
MEASURES = (*PARTS, "iou", "edge", "stray")


@dataclass
class Guided:
    """Samples of one guidance, one per round; all guidances of a `measure` have the same rounds.

    plan        rows per block of a step
    seconds     of a guided step, combination included
    delta       |c - p| / |c|, L2, per round; empty without a skip
    delta_of_cfg      |c - p| / |c - u|; empty without CFG
    kernels     what the blocks ran
    """

    plan: Plan
    seconds: list[float] = field(default_factory=list)
    delta: list[float] = field(default_factory=list)
    delta_of_cfg: list[float] = field(default_factory=list)
    kernels: str = ""


@torch.no_grad()
def measure(
    steps: Sequence[Step], config: STGConfig, guidances: Mapping[str, StepGuidance]
) -> Iterator[dict[str, Guided]]:
    """Run every guidance at every step, at least SAMPLES times in all; yields {name: Guided} after each round.

    Each round runs all guidances at one step, so that a machine that slows down slows all of them. A round of a prompt
    or model that is new to the engine is run once before, untimed: it computes what is kept for a whole generation.
    NO_GUIDANCE leaves uncond out. `config` is the engine's; the layers and scales are those of `guidances`.
    """
    with ExitStack() as stack:
        models = dict.fromkeys(step.transformer for step in steps)
        denoisers = {model: stack.enter_context(Denoiser(model, config)) for model in models}
        results: dict[str, Guided] = {}
        last: Step | None = None
        for number, step in enumerate(islice(cycle(steps), max(SAMPLES, len(steps)))):
            denoiser = denoisers[step.transformer]
            runs = {name: _Run(denoiser, guidance, step, name) for name, guidance in guidances.items()}
            if last is None or step.cond is not last.cond:
                for run in runs.values():
                    run()
            last = step
            with timing.without_gc():
                for name in timing.turns(list(runs), number):
                    run, device = runs[name], next(step.transformer.parameters()).device
                    seconds = timing.seconds(run, device)
                    result = results.setdefault(name, Guided(run.plan))
                    result.seconds.append(seconds)
                    result.kernels = denoiser.fusion.used if run.guidance.is_guided else "off"
                    run.note_delta(result)
            yield results


@dataclass
class _Run:
    """A guided step, ready to be called; `branches` [B, ...] are those of the last call's first output."""

    denoiser: Denoiser
    guidance: StepGuidance
    step: Step
    name: str
    branches: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self) -> None:
        step, uncond = self.step, self._uncond
        names, outputs = self.denoiser.predict(self.guidance, step.shared, step.cond, uncond)
        scale = 1.0 if uncond is None else step.guidance_scale
        for i, rows in enumerate(outputs):
            self.denoiser.combine(self.guidance, names, rows, scale, is_audio=i > 0, dtype=rows.dtype)
        self.branches = dict(zip(names, outputs[0].chunk(len(names)), strict=True))

    @property
    def plan(self) -> Plan:
        return self.denoiser.plan(self.guidance, uncond=self._uncond is not None)

    @property
    def _uncond(self) -> Mapping[str, Any] | None:
        return None if self.name == NO_GUIDANCE else self.step.uncond

    def note_delta(self, result: Guided) -> None:
        branches, self.branches = self.branches, {}
        if "skip" in branches:
            delta = _norm(branches["cond"] - branches["skip"])
            result.delta.append((delta / _norm(branches["cond"])).mean().item())
            if "uncond" in branches:
                result.delta_of_cfg.append((delta / _norm(branches["cond"] - branches["uncond"])).mean().item())


def _norm(x: Tensor) -> Tensor:
    """L2 norm of each video, [B, ...] -> [B]."""
    return x.double().flatten(1).norm(dim=1)


def model_of_case(case: Case) -> Model:
    """Family and number of blocks, from a transformer without values."""
    with torch.device("meta"):
        transformer = case.build()
    spec = spec_of(transformer)
    return Model(case.name, None, spec, len(spec.block_list(transformer)) // len(spec.axes))


def steps_of_case(case: Case, guidance_scale: float, device: torch.device, dtype: torch.dtype) -> list[Step]:
    """The one step that a case has; its transformer is built on the device. ValueError for CFG without uncond."""
    if guidance_scale > 1 and case.guidance_scale is None:
        raise ValueError(f"guidance_scale={guidance_scale} is not allowed: {case.name} has no CFG")
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            transformer = case.build()
    finally:
        torch.set_default_dtype(default)
    shared, cond, uncond = case.inputs(device, dtype)
    return [Step(transformer, shared, cond, uncond if guidance_scale > 1 else None, guidance_scale, 0.0, None)]


def steps_of_run(
    pipe: Any, setting: Setting, call: Mapping[str, Any], prompts: Sequence[str], seed: int = 0
) -> list[Step]:
    """Evenly spread steps of a short run of the pipeline per prompt, without STG; one video each, not decoded."""
    plain = guidance_arguments(pipe, Setting(None, setting.guidance_scale, None))
    sigmas = [None] * call["num_inference_steps"]
    pipe.set_progress_bar_config(desc="noise levels", disable=None)
    result: list[Step] = []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(seed + number)
        with _recorded_calls(pipe, recorded_steps(STGConfig(layers=(0,)), sigmas)) as (calls, tick):
            options = {"output_type": "latent", "callback_on_step_end": tick, **plain, **call}
            pipe(prompt=prompt, negative_prompt="", generator=generator, **options)
        result += steps_of(calls, sigmas, setting.guidance_scale)
    return result


@contextmanager
def _recorded_calls(pipe: Any, wanted: Sequence[int]) -> Iterator[tuple[dict[int, list[Call]], Any]]:
    """The calls of the pipeline's models in the steps `wanted`, and the callback that counts steps."""
    done = 0

    def tick(_pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done = step + 1
        return {}

    with recorded_calls(models_of(pipe), lambda: done if done in wanted else None) as calls:
        yield calls, tick


def judge(
    pipe: Any, specs: Sequence[ClipSpec], steps: int, guidance_scale: float, config: STGConfig | None
) -> dict[str, Tensor]:
    """Per clip what `demo.evaluate` measures: {"all": [N], "shape": ..., "iou": ..., "edge": ..., "stray": ...}.

    Clip i has the same caption and the same noise in every call; iou and edge are NaN where no shape is seen.
    """
    clips = generate(pipe, specs, guidance_scale=guidance_scale, config=config, steps=steps, progress=False).cpu()
    scores = [score(clips[i : i + 1], [spec]) for i, spec in enumerate(specs)]
    values = [[*(s.parts[part] for part in PARTS), s.iou or torch.nan, s.edge or torch.nan, s.stray] for s in scores]
    return dict(zip(MEASURES, torch.tensor(values, dtype=torch.float64).T, strict=True))
