"""attach(pipe, config): guided steps inside a diffusers pipeline. The only file that knows a pipeline.

A hook on the transformer returns the final guided prediction in every row that the pipeline asked for, in float32, so
that the pipeline's own guidance is the identity: `r + g (r - r) = r`, exact in floating point. Steps without skip
branches go through untouched.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from stg_engine.config import StepGuidance, STGConfig
from stg_engine.denoiser import Denoiser
from stg_engine.hooks import ArgumentHook, below_accelerate, hook_of, install, is_installed, remove
from stg_engine.inputs import split_rows
from stg_engine.plan import Plan, Plans
from stg_engine.report import Report, new_report

PIPELINES = ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline")
HOOK_NAME = "stg_engine_pipeline"


def attach(
    pipe: Any,
    config: STGConfig | None = None,
    *,
    execution: str = "batched",
    max_rows: int | None = None,
    kernels: str = "auto",
) -> Engine:
    """Switch Spatiotemporal Skip Guidance on in a diffusers pipeline; call `pipe(...)` as before.

    config     None takes the preset published for the model
    execution, max_rows, kernels   see `Denoiser`

    Negative prompt, guidance_rescale, callbacks and so on are the pipeline's own, and so is the guidance scale unless a
    schedule sets it per noise level. Returns an `Engine`, also a context manager. Raises `TypeError` for a pipeline
    that is not supported, `ValueError` for a wrong setting, `RuntimeError` for a compiled transformer.
    """
    names = [base.__name__ for base in type(pipe).__mro__]
    if not any(name in PIPELINES for name in names):
        raise TypeError(f"pipe is a {names[0]}; supported pipelines: {', '.join(PIPELINES)}")
    return Engine(pipe, Denoiser(pipe.transformer, config, execution=execution, max_rows=max_rows, kernels=kernels))


def detach(pipe: Any) -> None:
    """Switch STG off in a pipeline whose `Engine` is no longer at hand. Does nothing where it is not on."""
    hook = hook_of(pipe.transformer, HOOK_NAME)
    if isinstance(hook, _Takeover):
        hook.engine.detach()


class Engine:
    """A pipeline with STG on, until `detach()`.

    pipe      the pipeline, unchanged but for hooks
    denoiser  the `Denoiser` on its transformer
    """

    def __init__(self, pipe: Any, denoiser: Denoiser) -> None:
        self.pipe, self.denoiser = pipe, denoiser
        self._report = new_report(denoiser, denoiser.plans(), pipe._execution_device)
        self._steps: Iterator[StepGuidance] | None = None
        self._timestep: Any = None
        self._installed_forward = install(denoiser.transformer, _Takeover(self), HOOK_NAME)
        self._own_bar, self._progress_bar = vars(pipe).get("progress_bar"), pipe.progress_bar
        pipe.progress_bar = self._guarded_progress_bar

    @property
    def plan(self) -> Plan | Plans:
        """Rows per block while the skips are on; of the last call, or with an uncond branch before the first."""
        return self._report.plan

    @property
    def config(self) -> STGConfig:
        """The setting that is attached; another one needs another `attach`."""
        return self.denoiser.config

    def report(self) -> Report:
        """What ran in the last call."""
        return self._report

    def detach(self) -> None:
        """Switch STG off; pipeline and transformer are as they were. Safe to call twice."""
        if is_installed(self.denoiser.transformer, HOOK_NAME):
            remove(self.denoiser.transformer, HOOK_NAME)
            del self.pipe.progress_bar
            if self._own_bar is not None:
                self.pipe.progress_bar = self._own_bar
        self.denoiser.detach()

    def __enter__(self) -> Engine:
        if not is_installed(self.denoiser.transformer, HOOK_NAME):
            raise RuntimeError("this Engine is detached; call stg_engine.attach again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def predict(self, forward: Any, arguments: dict[str, Any]) -> Any:
        """The transformer's call in a step: rows [uncond, cond] or [cond] -> the guided prediction."""
        if self._steps is None:
            if not any(skip.scale > 0 for skip in self.config.skips):
                return forward(**arguments)
            raise RuntimeError(
                f"the transformer was called outside the denoising loop of the {type(self.pipe).__name__} that "
                "stg_engine is attached to; attach to the pipeline that runs, or use a Denoiser in a loop of your own"
            )
        timestep = getattr(self.pipe, "_current_timestep", None)  # the loop makes one object per step
        step = next(self._steps, None) if timestep is None or timestep is not self._timestep else None
        if step is None:
            raise RuntimeError(
                f"the transformer was called more often than once in a step of the {type(self.pipe).__name__} (by a "
                "callback, or by the pipeline itself); call it outside, or use a Denoiser in a loop of your own"
            )
        self._timestep = timestep
        self._report.steps += 1
        guidance_scale = self.pipe.guidance_scale if step.guidance_scale is None else step.guidance_scale
        if step.is_plain:
            return forward(**arguments)
        self._report.guided_steps += bool(step.skips)
        return self._guided(step, forward, arguments, guidance_scale)

    def _guided(self, step: StepGuidance, forward: Any, arguments: dict[str, Any], guidance_scale: float) -> Any:
        self._check_step(step, guidance_scale)  # again: a callback may have changed the call's own settings
        return_dict = arguments.pop("return_dict", True)
        copies = 2 if self.pipe.do_classifier_free_guidance else 1
        shared, cond, uncond = split_rows(self.denoiser.spec, arguments, copies)
        names, (rows, *_) = self.denoiser.predict(step, shared, cond, uncond if guidance_scale > 1 else None, forward)
        guided = self.denoiser.combine(step, names, rows, guidance_scale, self._pipeline_rescale())
        guided = guided.repeat(copies, *[1] * (guided.ndim - 1))
        return Transformer2DModelOutput(sample=guided) if return_dict else (guided,)

    def _pipeline_rescale(self) -> float:
        """The call's guidance_rescale, which diffusers ignores without an uncond branch."""
        return float(getattr(self.pipe, "guidance_rescale", 0.0)) if self.pipe.do_classifier_free_guidance else 0.0

    def _check_step(self, step: StepGuidance, guidance_scale: float) -> None:
        if self._pipeline_rescale() > 0 and step.rescale > 0:
            raise ValueError(
                f"guidance_rescale={self._pipeline_rescale()} and rescale={step.rescale} are the same operation; "
                "set one of them"
            )
        if guidance_scale > 1 and not self.pipe.do_classifier_free_guidance:
            raise ValueError(
                f"guidance_scale={guidance_scale} in the schedule needs the negative prompt; "
                "call the pipeline with guidance_scale above 1 so that it encodes one"
            )

    def _plan_steps(self) -> Iterator[StepGuidance]:
        """The guidance of each step of the loop that begins. Raises what `_check_step` raises, before the first."""
        count, sigmas = self.pipe.num_timesteps, None
        if self.config.schedule is not None:
            # The loop may run the tail of the scheduler's steps (strength below 1); behind the last stands a zero.
            # Timesteps will not do: some schedulers round them to integers.
            sigmas = self.pipe.scheduler.sigmas[-count - 1 : -1].tolist()
        steps = [self.config.at(i / count, None if sigmas is None else sigmas[i]) for i in range(count)]
        for step in steps:
            self._check_step(step, step.guidance_scale or 0.0)
        scheduled = [step.guidance_scale for step in steps if step.guidance_scale is not None]
        if set(scheduled) - {self.pipe.guidance_scale}:
            values = ", ".join(f"{scale:g}" for scale in sorted(set(scheduled)))
            use = f"in {count - len(scheduled)} of {count} steps" if len(scheduled) < count else "nowhere"
            call = f"the call's {self.pipe.guidance_scale:g} is used {use}"
            self._report.note = f"guidance scales {values} are the schedule's; {call}"
        return iter(steps)

    @contextmanager
    def _denoising_loop(self) -> Iterator[None]:
        self._check_hooked()
        denoiser, device = self.denoiser, self.pipe._execution_device
        self._report = new_report(denoiser, denoiser.plans(self.pipe.guidance_scale), device)
        self._steps, denoiser.differences = self._plan_steps(), {}
        denoiser.fusion.forget_attention()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        try:
            yield
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                self._report.peak_bytes = torch.cuda.max_memory_allocated(device)
            self._report.kernels = denoiser.fusion.used if self._report.guided_steps else "none: no guided step"
            self._report.attention = denoiser.fusion.attention() or self._report.attention
            self._report.seconds = time.perf_counter() - began
            self._report.differences = {name: value.item() for name, value in denoiser.differences.items()}
        finally:
            self._steps = self._timestep = None
            denoiser.release()
        for name, value in self._report.differences.items():
            if value == 0:
                warnings.warn(f"branch {name!r} equals cond (max |c - p| = 0): this skip changes nothing", stacklevel=3)

    @contextmanager
    def _guarded(self, bar: Any) -> Iterator[Any]:
        with self._denoising_loop(), bar as entered:
            yield entered

    def _guarded_progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        # Every diffusers loop runs inside `with self.progress_bar(total=...)`: the one place that sees a call begin,
        # end, be interrupted or raise.
        bar = self._progress_bar(iterable, total) if iterable is not None else self._progress_bar(total=total)
        return bar if iterable is not None else self._guarded(bar)

    def _check_hooked(self) -> None:
        if self.pipe.transformer is not self.denoiser.transformer:
            raise RuntimeError("pipe.transformer was replaced after stg_engine was attached; detach and attach again")
        with below_accelerate(self.denoiser.transformer):
            forward: Any = self.denoiser.transformer.forward
        while forward is not None and forward is not self._installed_forward:
            forward = getattr(forward, "__wrapped__", None)
        if forward is None:
            raise RuntimeError(
                "stg_engine's hook is no longer in the transformer's forward: something put an older forward back; "
                "detach and attach again after it"
            )


class _Takeover(ArgumentHook):
    """Hands the transformer's calls to the engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.engine.predict(self.fn_ref.original_forward, dict(self.bind(module, args, kwargs)))
