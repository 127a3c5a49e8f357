"""attach(pipe, config): guided steps inside a diffusers pipeline. The only file that knows a pipeline.

A hook on the transformer returns the final guided prediction in every row that the pipeline asked for, in float32, so
that the pipeline's own guidance is the identity: `r + g (r - r) = r`, exact in floating point. Steps without skip
branches go through untouched.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from stg_engine.calls import PIPELINES, Calls, Step
from stg_engine.config import StepGuidance, STGConfig
from stg_engine.denoiser import Denoiser
from stg_engine.hooks import (
    GUIDER_HOOK,
    PIPELINE_HOOK,
    ArgumentHook,
    below_accelerate,
    hook_of,
    install,
    is_installed,
    remove,
)
from stg_engine.plan import Plan, Plans
from stg_engine.report import Report, new_report


def attach(
    pipe: Any,
    config: STGConfig | None = None,
    *,
    execution: str = "batched",
    max_rows: int | None = None,
    kernels: str = "auto",
    graph: bool = False,
    compile: str | None = None,
) -> Engine:
    """Switch Spatiotemporal Skip Guidance on in a diffusers pipeline; call `pipe(...)` as before.

    config     None takes the preset published for the model, and in pipelines with STG of their own (LTX-2) what they
               are called with
    execution, max_rows, kernels, graph, compile   see `Denoiser`; graphs are kept for one call of the pipeline

    Negative prompt, guidance_rescale, callbacks and so on are the pipeline's own, and so is the guidance scale unless a
    schedule sets it per noise level. Returns an `Engine`, also a context manager. Raises `TypeError` for a pipeline
    that is not supported, `ValueError` for a wrong setting, `RuntimeError` for a compiled transformer.
    """
    names = [base.__name__ for base in type(pipe).__mro__]
    known = [name for name in names if name in PIPELINES]
    if not known:
        raise TypeError(
            f"pipe is a {names[0]}; supported pipelines: {', '.join(PIPELINES)}. A pipeline with a guider takes an "
            "STGGuidance, a transformer of a supported family a Denoiser"
        )
    calls = PIPELINES[known[0]]
    models = [model for name in calls.models if (model := getattr(pipe, name, None)) is not None]
    if not models:
        raise ValueError(f"{names[0]} has no {' or '.join(calls.models)}; load one before you attach")
    with ExitStack() as stack:
        options: dict[str, Any] = {"execution": execution, "max_rows": max_rows, "kernels": kernels}
        options |= {"graph": graph, "compile": compile}
        config = calls.own if config is None else config
        denoisers = [stack.enter_context(Denoiser(model, config, **options)) for model in models]
        engine = Engine(pipe, calls, denoisers)
        stack.pop_all()
    return engine


def detach(pipe: Any) -> None:
    """Switch STG off in a pipeline whose `Engine` or `STGGuidance` is no longer at hand, if it is on."""
    for model in pipe.components.values():
        for name in (PIPELINE_HOOK, GUIDER_HOOK) if isinstance(model, nn.Module) else ():
            hook = hook_of(model, name)
            if hook is not None:
                hook.owner.detach()


class Engine:
    """A pipeline with STG on, until `detach()`.

    pipe       the pipeline, unchanged but for hooks
    denoisers  a `Denoiser` on each of its transformers (Wan 2.2 has two)
    denoiser   the first of them
    """

    def __init__(self, pipe: Any, calls: type[Calls], denoisers: list[Denoiser]) -> None:
        self.pipe, self.denoisers, self.denoiser = pipe, tuple(denoisers), denoisers[0]
        self._kind = calls
        self._calls: Calls | None = None
        self._report = new_report(self.denoiser, self.denoiser.plans(), pipe._execution_device)
        self._steps: Iterator[tuple[StepGuidance, float | None]] = iter(())
        self._guidance = StepGuidance()
        self._sigma: float | None = None
        self._timestep: Any = None
        self._count = 0
        self._forwards = [
            install(denoiser.transformer, _Takeover(self, denoiser), PIPELINE_HOOK) for denoiser in denoisers
        ]
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
        for denoiser in self.denoisers:
            if is_installed(denoiser.transformer, PIPELINE_HOOK):
                remove(denoiser.transformer, PIPELINE_HOOK)
            denoiser.detach()
        if vars(self.pipe).get("progress_bar") == self._guarded_progress_bar:
            del self.pipe.progress_bar
            if self._own_bar is not None:
                self.pipe.progress_bar = self._own_bar

    def __enter__(self) -> Engine:
        if not is_installed(self.denoiser.transformer, PIPELINE_HOOK):
            raise RuntimeError("this Engine is detached; call stg_engine.attach again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def predict(self, denoiser: Denoiser, forward: Any, arguments: dict[str, Any]) -> Any:
        """A call of a transformer: inside a step, what its branches make of the rows that the pipeline asked for."""
        if self._calls is None:
            if not self.config.is_on:
                return forward(**arguments)
            raise RuntimeError(
                f"the transformer was called outside the denoising loop of the {type(self.pipe).__name__} that "
                "stg_engine is attached to; attach to the pipeline that runs, or use a Denoiser in a loop of your own"
            )
        timestep = getattr(self.pipe, "_current_timestep", None)  # the loop makes one object per step
        if timestep is None or timestep is not self._timestep:
            self._begin_step(self._calls, timestep)
        if self._count == self._calls.most:
            raise self._too_many_calls()
        step = Step(self._guidance, self._sigma, self._count, denoiser, forward)
        self._count += 1
        if step.guidance.is_plain and not self._calls.sees_plain_steps:
            return denoiser.plain(forward, arguments)
        if step.call == 0:
            self._calls.check(step.guidance)  # again: a callback may have changed the call's own settings
            self._report.guided_steps += step.guidance.is_guided
        return self._calls.predict(step, arguments)

    def _begin_step(self, calls: Calls, timestep: Any) -> None:
        try:
            planned, self._sigma = next(self._steps)
        except StopIteration:
            raise self._too_many_calls() from None
        self._guidance = calls.guidance(planned, self.config)
        self._timestep, self._count = timestep, 0
        self._report.steps += 1

    def _too_many_calls(self) -> RuntimeError:
        most = "once" if self._kind.most == 1 else f"{self._kind.most} times"
        return RuntimeError(
            f"the transformer was called more often than {most} in a step of the {type(self.pipe).__name__} (by a "
            "callback, or by the pipeline itself); call it outside, or use a Denoiser in a loop of your own"
        )

    def _plan_steps(self, calls: Calls) -> list[tuple[StepGuidance, float | None]]:
        """The guidance and, if it is asked for, sigma of each step of the loop that begins.

        Raises what `Calls.check` raises, before the first.
        """
        count = self.pipe.num_timesteps
        sigmas = self._sigmas(count) if self.config.needs_sigma else [None] * count
        steps = [self.config.at(i / count, sigma) for i, sigma in enumerate(sigmas)]
        for step in steps:
            calls.check(step)
        return list(zip(steps, sigmas, strict=True))

    def _sigmas(self, count: int) -> list[float]:
        what = "schedule" if self.config.schedule is not None else f"space={self.config.space!r}"
        what = f"zero_init={self.config.zero_init}" if self.config.zero_init < 1 else what
        sigmas = getattr(self.pipe.scheduler, "sigmas", None)
        if sigmas is None:
            raise ValueError(
                f"{what} is not allowed with {type(self.pipe.scheduler).__name__}, which has no sigmas; use a "
                "flow-matching scheduler, or a config that needs no noise levels"
            )
        # The loop may run the tail of the scheduler's steps (strength below 1); behind the last stands a zero.
        # Timesteps will not do: some schedulers round them to integers.
        sigmas = sigmas[-count - 1 : -1].tolist()
        if len(sigmas) < count:
            raise ValueError(
                f"{what} is not allowed in this call: {type(self.pipe).__name__} gives frames noise levels of their "
                f"own, in {count} steps for {len(sigmas)} sigmas"
            )
        return sigmas

    def _schedule_note(self, steps: list[StepGuidance]) -> str:
        scheduled = [step.guidance_scale for step in steps if step.guidance_scale is not None]
        if not scheduled or not set(scheduled) - {self.pipe.guidance_scale}:
            return ""
        values = ", ".join(f"{scale:g}" for scale in sorted(set(scheduled)))
        use = f"in {len(steps) - len(scheduled)} of {len(steps)} steps" if len(scheduled) < len(steps) else "nowhere"
        return f"guidance scales {values} are the schedule's; the call's {self.pipe.guidance_scale:g} is used {use}"

    @contextmanager
    def _denoising_loop(self) -> Iterator[None]:
        self._check_hooked()
        device = self.pipe._execution_device
        calls = self._kind(self.pipe)
        steps = self._plan_steps(calls)
        self._report = new_report(self.denoiser, calls.plans(self.denoiser), device)
        self._report.note = self._schedule_note([step for step, _ in steps])
        self._steps, self._calls, self._timestep = iter(steps), calls, None
        for denoiser in self.denoisers:
            denoiser.differences = {}
            denoiser.fusion.forget_attention()
            if denoiser.graphs is not None:
                denoiser.graphs.forget()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        try:
            yield
            calls.end()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                self._report.peak_bytes = torch.cuda.max_memory_allocated(device)
            self._report.seconds = time.perf_counter() - began
            self._fill_report(calls)
        finally:
            self._calls, self._timestep = None, None
            for denoiser in self.denoisers:
                denoiser.release()
        for name, value in self._report.differences.items():
            if value == 0:
                strong = "uncond" if self.config.weak_pass == "negative_prompt" else "cond"
                warnings.warn(
                    f"branch {name!r} equals {strong} (max |{strong[0]} - p| = 0): this skip changes nothing",
                    stacklevel=3,
                )

    def _fill_report(self, calls: Calls) -> None:
        report = self._report
        report.plan = calls.plans(self.denoiser)
        ran = [denoiser for denoiser in self.denoisers if denoiser.differences] or [self.denoiser]
        report.kernels = ran[0].fusion.used if report.guided_steps else "none: no guided step"
        report.graphs = "; ".join(str(denoiser.graphs) for denoiser in self.denoisers if denoiser.graphs is not None)
        report.compiled = "" if ran[0].compiler is None else ran[0].compiler.used
        report.attention = ran[0].fusion.attention() or report.attention
        for denoiser in ran:
            for name, value in denoiser.differences.items():
                report.differences[name] = max(value.item(), report.differences.get(name, 0.0))

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
        models = [model for name in self._kind.models if (model := getattr(self.pipe, name, None)) is not None]
        if [*map(id, models)] != [id(denoiser.transformer) for denoiser in self.denoisers]:
            raise RuntimeError("pipe.transformer was replaced after stg_engine was attached; detach and attach again")
        for model, installed in zip(models, self._forwards, strict=True):
            with below_accelerate(model):
                forward: Any = model.forward
            while forward is not None and forward is not installed:
                forward = getattr(forward, "__wrapped__", None)
            if forward is None:
                raise RuntimeError(
                    "stg_engine's hook is no longer in the transformer's forward: something put an older forward "
                    "back; detach and attach again after it"
                )


class _Takeover(ArgumentHook):
    """Hands a transformer's calls to the engine."""

    def __init__(self, owner: Engine, denoiser: Denoiser) -> None:
        super().__init__()
        self.owner, self.denoiser = owner, denoiser

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(self.bind(module, args, kwargs))
        return self.owner.predict(self.denoiser, self.fn_ref.original_forward, arguments)
