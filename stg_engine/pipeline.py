"""attach(pipe, config): guided steps inside a diffusers pipeline. The only file that knows a pipeline.

A hook on the transformer returns the final guided prediction in every row that the pipeline asked for, in float32, so
that the pipeline's own guidance is the identity: `r + g (r - r) = r`, exact in floating point. Steps without skip
branches go through untouched.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from stg_engine.config import StepGuidance, STGConfig
from stg_engine.denoiser import Denoiser
from stg_engine.plan import Plan, Plans
from stg_engine.report import Report, new_report
from stg_engine.rows import below_accelerate, install, is_installed, remove

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

    The guidance scale, negative prompt, guidance_rescale, callbacks and so on are the pipeline's own. Returns an
    `Engine`, also a context manager. Raises `TypeError` for a pipeline that is not supported, `ValueError` for a wrong
    setting.
    """
    names = [base.__name__ for base in type(pipe).__mro__]
    if not any(name in PIPELINES for name in names):
        raise TypeError(f"pipe is a {names[0]}; supported pipelines: {', '.join(PIPELINES)}")
    return Engine(pipe, Denoiser(pipe.transformer, config, execution=execution, max_rows=max_rows, kernels=kernels))


class Engine:
    """A pipeline with STG on, until `detach()`.

    pipe      the pipeline, unchanged but for hooks
    denoiser  the `Denoiser` on its transformer
    """

    def __init__(self, pipe: Any, denoiser: Denoiser) -> None:
        self.pipe, self.denoiser, self.config = pipe, denoiser, denoiser.config
        self._report = new_report(denoiser, denoiser.plans())
        self._step: int | None = None
        self._sigmas: list[float] = []
        self._installed_forward = install(denoiser.transformer, _Takeover(self), HOOK_NAME)
        self._own_bar, self._progress_bar = vars(pipe).get("progress_bar"), pipe.progress_bar
        pipe.progress_bar = self._guarded_progress_bar

    @property
    def plan(self) -> Plan | Plans:
        """Rows per block while the skips are on; of the last call, or with an uncond branch before the first."""
        return self._report.plan

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
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def predict(self, forward: Any, arguments: dict[str, Any]) -> Any:
        """The transformer's call in a step: rows [uncond, cond] or [cond] -> the guided prediction."""
        if self._step is None:
            if not any(skip.scale > 0 for skip in self.config.skips):
                return forward(**arguments)
            raise RuntimeError(
                f"the transformer was called outside the denoising loop of the {type(self.pipe).__name__} that "
                "stg_engine is attached to; attach to the pipeline that runs, or use a Denoiser in a loop of your own"
            )
        step = self.config.at(self._step / max(self.pipe.num_timesteps, 1), self._sigma())
        self._step += 1
        self._report.steps += 1
        guidance_scale = self.pipe.guidance_scale if step.guidance_scale is None else step.guidance_scale
        if not step.skips and step.guidance_scale is None:
            return forward(**arguments)
        self._report.guided_steps += bool(step.skips)
        return self._guided(step, forward, arguments, guidance_scale)

    def _guided(self, step: StepGuidance, forward: Any, arguments: dict[str, Any], guidance_scale: float) -> Any:
        rescale = self._pipeline_rescale(step)
        return_dict = arguments.pop("return_dict", True)
        copies = 2 if self.pipe.do_classifier_free_guidance else 1
        shared, cond, uncond = self._split(arguments, copies)
        if guidance_scale > 1 and uncond is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} in the schedule needs the negative prompt; "
                "call the pipeline with guidance_scale above 1 so that it encodes one"
            )
        branches = self.denoiser.predict(step, shared, cond, uncond if guidance_scale > 1 else None, forward)
        guided = self.denoiser.combine(step, branches, guidance_scale, rescale)
        guided = guided.repeat(copies, *[1] * (guided.ndim - 1))
        return Transformer2DModelOutput(sample=guided) if return_dict else (guided,)

    def _split(self, arguments: dict[str, Any], copies: int) -> tuple[dict, dict, dict | None]:
        """The pipeline's rows [uncond, cond] as (shared, cond, uncond); uncond is None where the pipeline has none."""
        spec = self.denoiser.spec
        videos = arguments[spec.latents[0]].shape[0] // copies
        prompt = {name: arguments[name] for name in spec.prompt if name in arguments}
        shared = {name: value for name, value in arguments.items() if name not in prompt}
        shared.update(
            {name: value[:videos] for name, value in shared.items() if name in spec.latents and value is not None}
        )
        for name, value in prompt.items():
            # A callback may switch CFG off and leave the negative rows in front of the mask, which it cannot reach.
            if value is not None and len(value) != copies * videos and (copies, len(value)) != (1, 2 * videos):
                raise ValueError(f"{name} has {len(value)} rows, the latents have {copies * videos}; they must agree")
        cond = {name: value if value is None else value[-videos:] for name, value in prompt.items()}
        uncond = {name: value if value is None else value[:videos] for name, value in prompt.items()}
        return shared, cond, uncond if copies == 2 else None

    def _pipeline_rescale(self, step: StepGuidance) -> float:
        rescale = float(getattr(self.pipe, "guidance_rescale", 0.0))
        if rescale > 0 and step.rescale > 0:
            raise ValueError(
                f"guidance_rescale={rescale} and rescale={step.rescale} are the same operation; set one of them"
            )
        return rescale

    def _sigma(self) -> float | None:
        return self._sigmas[self._step] if self._step is not None and self._step < len(self._sigmas) else None

    @contextmanager
    def _denoising_loop(self) -> Iterator[None]:
        self._check_hooked()
        denoiser, device = self.denoiser, self.denoiser.transformer.device
        self._report = new_report(denoiser, denoiser.plans(self.pipe.guidance_scale))
        self._step, denoiser.differences = 0, {}
        # The loop may run the tail of the scheduler's timesteps (strength below 1); their values are read once, here.
        timesteps = self.pipe.scheduler.timesteps[-self.pipe.num_timesteps :].tolist() if self.config.schedule else []
        self._sigmas = [timestep / self.pipe.scheduler.config.num_train_timesteps for timestep in timesteps]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        try:
            yield
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                self._report.peak_bytes = torch.cuda.max_memory_allocated(device)
            self._report.seconds = time.perf_counter() - began
            self._report.differences = {name: value.item() for name, value in denoiser.differences.items()}
        finally:
            self._step = None
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


class _Takeover(ModelHook):
    """Hands the transformer's calls to the engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.signature = inspect.signature(type(module).forward)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = self.signature.bind_partial(module, *args, **kwargs).arguments
        return self.engine.predict(self.fn_ref.original_forward, {k: v for k, v in arguments.items() if k != "self"})
