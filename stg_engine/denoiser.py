"""A transformer and a config -> the guided prediction, for loops of your own and for `stg_engine.attach`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine import guidance
from stg_engine.combine import Combiner, check_conventions, per_output
from stg_engine.config import StepGuidance, STGConfig, number
from stg_engine.fused import Fusion
from stg_engine.guard import refuse_compiled, refuse_in_guided_step, refuse_left_out, refuse_misfit
from stg_engine.hooks import install, is_installed, remove, signature_of
from stg_engine.inputs import (
    Inputs,
    all_rows,
    check_inputs,
    kept_prompt,
    lengths_of,
    other_sources,
    prompt_lengths,
)
from stg_engine.memo import Memo, fingerprint
from stg_engine.models import modules_in_blocks, spec_of
from stg_engine.once import guided_hooks, kept_modules
from stg_engine.plan import Plan, Plans, build_plans, check_layers
from stg_engine.presets import PRESETS
from stg_engine.rows import Run, Slot
from stg_engine.runtime.compile import Compiler, check_mode
from stg_engine.runtime.graphs import Graphs

EXECUTIONS = ("batched", "serial")
KERNELS = ("auto", "off")


class Denoiser:
    """Guided predictions of a transformer whose branches run as rows of one forward.

    transformer  a supported diffusers transformer, in eval mode; hooked until `detach()`, never replaced
    config       an `STGConfig`; None takes the preset published for the model
    execution    "batched": all rows of a block at once; "serial": a block row by row, least memory, every branch
                 bitwise equal to its pass run alone on that video with the same kernels
    max_rows     at most this many rows at once; serial is max_rows=1
    kernels      "auto": blocks and guidance from `stg_kernels` where family and device have them; "off": the modules as
                 they are. `fusion.used` says what the last guided step ran
    compile      None, or a mode of `torch.compile`, "default" or "max-autotune-no-cudagraphs": blocks are compiled, one
                 function per class, in place of the blocks from `stg_kernels`. `compiler.used` says which
    share        False: branches that are equal are computed all the same, which shows what sharing is worth
    graph        True: a forward is captured as a CUDA graph in its first step and launched as one in later steps with
                 inputs of the same kind, whose memory stays taken until `release()`; see `runtime.graphs`

    What follows from prompt and weights alone is kept from step to step; call `release()` after writing either in a way
    that PyTorch does not count: through `.data`, as hotswapping a LoRA does, or through a NumPy array. `differences`
    holds, per skip, max |c - p| of its first step (|u - p| on the negative prompt; none for a weak uncond), a scalar
    tensor: 0 means that the skip changes nothing.

    Raises `TypeError` for an unknown transformer, `ValueError` for a setting that the model does not have, and for a
    transformer that is hooked already. One thread at a time; each thread needs a transformer and a Denoiser of its own.
    """

    def __init__(
        self,
        transformer: nn.Module,
        config: STGConfig | None = None,
        *,
        execution: str = "batched",
        max_rows: int | None = None,
        kernels: str = "auto",
        share: bool = True,
        graph: bool = False,
        compile: str | None = None,
    ) -> None:
        self.spec = spec_of(getattr(transformer, "_orig_mod", transformer))
        self.transformer = transformer
        self.blocks = self.spec.block_list(transformer)
        self.num_layers = len(self.blocks) // len(self.spec.axes)
        refuse_compiled(transformer, self.blocks)
        refuse_misfit(self.spec, transformer, self.blocks)
        self.config = self._published() if config is None else config
        self.execution, self.kernels, self.max_rows = execution, kernels, _max_rows(execution, max_rows)
        if kernels not in KERNELS:
            raise ValueError(f"kernels={kernels!r} is not allowed; choose one of {', '.join(map(repr, KERNELS))}")
        check_mode(compile)
        self.share = share
        self._check_config()
        if is_installed(self.blocks[0]):
            raise ValueError(
                "transformer has an Engine or a Denoiser on it already; call its detach(), or stg_engine.detach(pipe)"
            )
        self.memo = Memo()
        self.differences: dict[str, Tensor] = {}
        self._attentions = self._in_blocks((*self.spec.self_attention, *self.spec.links))
        self.compiler = None if compile is None else Compiler(self.spec, self.blocks, compile)
        self.fusion = Fusion(self.spec.fused, kernels, is_compiled=compile is not None)
        self.graphs = Graphs(transformer, self.spec, self.fusion, self.memo) if graph else None
        self._combiner = Combiner(self.config, self.fusion)
        self._slot = Slot(compiler=self.compiler)
        self._plans: dict[tuple[StepGuidance, bool], Plan] = {}
        self._hooked: list[nn.Module] = []
        self._forwards: list[tuple[Any, Any]] = []
        self._install()

    def __call__(
        self,
        shared: Inputs,
        cond: Inputs,
        uncond: Inputs | None = None,
        *,
        guidance_scale: float | Tensor | None = None,
        progress: float | None = None,
        sigma: float | None = None,
        token_sigmas: Tensor | Sequence[Tensor] | None = None,
    ) -> Any:
        """`u + g (c - u) + sum_i s_i (c - p_i) + (mu - 1)(c - m)` and the rescale, in the transformer's output dtype.

        shared          the transformer's keyword arguments that all branches have in common (B videos)
        cond, uncond    those that depend on the prompt; without uncond the result is `c + sum_i s_i (c - p_i)`
        guidance_scale  g, or a tensor that broadcasts to a prediction; needed with uncond, not allowed without it
                        (except 1); a schedule's entry may set it
        progress        step index / number of steps, in [0, 1); needed if the config has start or stop
        sigma           noise level of this step, 1 is pure noise; needed if `config.needs_sigma`
        token_sigmas    those of the tokens for x0, [B, S] (of each output), where they differ: LTX-2's sigma * mask
        """
        step = self.config.at(progress, sigma)
        if step.guidance_scale is not None:
            guidance_scale, uncond = (step.guidance_scale, uncond) if step.guidance_scale > 1 else (None, None)
        if guidance_scale is not None and not isinstance(guidance_scale, Tensor):
            number("guidance_scale", guidance_scale, 0.0)
        if uncond is not None and guidance_scale is None:
            raise ValueError("guidance_scale=None is not allowed with uncond; pass g of u + g (c - u)")
        if uncond is None and (isinstance(guidance_scale, Tensor) or guidance_scale not in (None, 1, 1.0)):
            raise ValueError(f"guidance_scale={guidance_scale} needs uncond, which is None")
        latents = [shared.get(name) for name in self.spec.velocity_of]
        sigmas = per_output(token_sigmas, sigma, max(len(latents), 1))
        if step.is_zero:
            check_inputs(self.transformer, self.spec, shared, cond, uncond)
            guided = tuple(map(guidance.zero_init, latents, sigmas))
        else:
            names, outputs = self.predict(step, shared, cond, uncond)
            scale = 1.0 if guidance_scale is None else guidance_scale
            guided = tuple(
                self.combine(step, names, rows, scale, is_audio=i > 0, dtype=rows.dtype, latents=x, sigma=level)
                for i, (rows, x, level) in enumerate(zip_longest(outputs, latents, sigmas))
            )
        return guided if len(guided) > 1 else guided[0]

    def branches(
        self,
        shared: Inputs,
        cond: Inputs,
        uncond: Inputs | None = None,
        *,
        progress: float | None = None,
        sigma: float | None = None,
    ) -> Any:
        """The predictions before they are combined: {"uncond": ..., "cond": ..., "skip": ..., "modality": ...}."""
        names, outputs = self.predict(self.config.at(progress, sigma), shared, cond, uncond)
        branches = tuple(dict(zip(names, rows.chunk(len(names)), strict=True)) for rows in outputs)
        return branches if len(branches) > 1 else branches[0]

    def plan(self, step: StepGuidance, *, uncond: bool = True) -> Plan:
        """Rows per block for one step's guidance."""
        key = (step, uncond)
        if key not in self._plans:
            options = self._plan_options(is_on=step.is_guided)
            self._plans[key] = Plan.build(step, self.num_layers, uncond=uncond, **options)
        return self._plans[key]

    def plans(self, guidance_scale: float | None = None, *, uncond: bool = True) -> Plan | Plans:
        """The config's plan while its skips are on, uncond left out at `guidance_scale` <= 1; a schedule's plans."""
        options = self._plan_options(is_on=self.config.is_on)
        if self.config.schedule is not None:
            scale = guidance_scale if uncond else 1.0
            return build_plans(self.config, self.num_layers, guidance_scale=scale, **options)
        scales = (guidance_scale, self.config.audio and self.config.audio.guidance_scale)
        uncond = uncond and (guidance_scale is None or any((scale or 0) > 1 for scale in scales))
        return Plan.build(self.config, self.num_layers, uncond=uncond, **options)

    def release(self) -> None:
        """Drop what is kept from step to step: prompt keys and values, caption projection, CUDA graphs."""
        self.memo.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def detach(self) -> None:
        """Take all hooks off; the transformer is as it was. Safe to call twice."""
        self.release()
        while self._hooked:
            remove(self._hooked.pop())
        self._forget_child_registries()

    def __enter__(self) -> Denoiser:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def predict(
        self,
        step: StepGuidance,
        shared: Inputs,
        cond: Inputs,
        uncond: Inputs | None,
        forward: Callable[..., Any] | None = None,
    ) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
        """Run the branches of one step: their names, and each output's rows [K * B, ...] in that order.

        `forward` stands in for the transformer's own (a hook's inner forward).
        """
        if not self._hooked:
            raise RuntimeError("this Denoiser is detached; make a new one")
        forward = self.transformer if forward is None else forward
        videos = check_inputs(self.transformer, self.spec, shared, cond, uncond)
        if step.is_zero:
            raise ValueError(f"zero_init={self.config.zero_init} leaves nothing to predict here; x0 is 0 in this step")
        plan = self.plan(step, uncond=uncond is not None)
        run = partial(self._guided if step.is_guided else self._plain, plan, videos, forward)
        try:
            if self.graphs is None:
                outputs = run(shared, cond, uncond, None)
            else:
                asks = step.is_guided and self.fusion.is_possible
                lengths = lengths_of(self.spec, plan, videos, cond, uncond, self.memo) if asks else None
                inputs, has_lengths = (shared, cond, uncond, lengths), lengths != {} if step.is_guided else None
                outputs = self.graphs(run, (plan, step.is_guided), inputs, forward, has_lengths=has_lengths)
        except BaseException:
            self.release()
            raise
        if step.is_guided:
            self._combiner.note_differences(self.differences, step, plan.names, outputs[0])
        return plan.names, outputs

    def plain(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """`forward(**arguments)`, the transformer's own call, by a graph if there are graphs."""
        return forward(**arguments) if self.graphs is None else self.graphs.plain(forward, arguments)

    def _plain(self, plan: Plan, videos: int, forward: Callable[..., Any], *inputs: Any) -> tuple[Tensor, ...]:
        """Plain diffusers, whatever else is on."""
        return self._outputs(forward, all_rows(self.spec, plan.names, *inputs[:3]))

    def _guided(self, plan: Plan, videos: int, forward: Callable[..., Any], *inputs: Any) -> tuple[Tensor, ...]:
        shared, cond, uncond, lengths = inputs
        self._refuse_replaced_modules()
        refuse_compiled(self.transformer, self._hooked)
        refuse_in_guided_step(self.transformer, self._forwards)
        prompt, latents = kept_prompt(self.spec, cond, uncond), {**shared, **cond}[self.spec.latents[0]]
        kept = kept_modules(self.spec, self.transformer, self.blocks)
        self.memo.keep_only(fingerprint(kept), other_sources(latents, shared), prompt)
        fused = self.fusion.forwards(self.transformer, self.blocks, latents)
        rows = all_rows(self.spec, plan.names, shared, cond, uncond, self.memo, plan.negative)
        if lengths is None:
            lengths = prompt_lengths(self.spec, rows, len(plan.names) * videos, self.memo) if any(fused) else {}
        self.fusion.has_masks |= any(fused) and not lengths
        texts = tuple(value for value in prompt if value is not None)
        self._slot.run = Run(plan, self.spec, videos, self.max_rows, self.memo, fused, texts, **lengths)
        try:
            outputs = self._outputs(forward, rows)
            refuse_left_out(self.spec, self._slot.run.next, plan.num_blocks)
        finally:
            self._slot.run = None
        return outputs

    def combine(
        self,
        step: StepGuidance,
        names: tuple[str, ...],
        rows: Tensor,
        guidance_scale: float | Tensor,
        rescale: float = 0.0,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Tensor:
        """The guided prediction [B, ...] of `predict`'s rows, by this config's conventions, rounded once, to `dtype`
        (None: float32, float64 for float64).

        guidance_scale  where the step's audio sets none; `rescale` where the step has none
        is_audio        the rows are the audio output's
        latents, sigma  x [B, ...] and its noise level, a number or [B, S]: for space="x0"

        `guidance.combine`, or `stg_kernels.combine_guidance` where the step's blocks were fused.
        """
        return self._combiner(step, names, rows, guidance_scale, rescale=rescale, dtype=dtype, **options)

    def _outputs(self, forward: Callable[..., Any], rows: Inputs) -> tuple[Tensor, ...]:
        options = {"return_dict": False} if "return_dict" in signature_of(type(self.transformer)).parameters else {}
        outputs = forward(**rows, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _plan_options(self, *, is_on: bool) -> dict[str, Any]:
        return {**self.spec.plan_options(is_on=is_on), "is_shared": self.share}

    def _in_blocks(self, paths: tuple[str, ...]) -> list[nn.Module]:
        return modules_in_blocks(self.blocks, paths)

    def _refuse_replaced_modules(self) -> None:
        blocks = self.spec.block_list(self.transformer)
        attentions = self._in_blocks((*self.spec.self_attention, *self.spec.links))
        if any(map(operator.is_not, blocks, self.blocks)) or any(map(operator.is_not, attentions, self._attentions)):
            raise RuntimeError("a block or an attention in it was replaced; detach and attach again")

    def _check_config(self) -> None:
        if not isinstance(self.config, STGConfig):
            raise TypeError(f"config={self.config!r} is not allowed; it must be an STGConfig")
        for skip in self.config.skips:
            check_layers(skip, self.num_layers, self.spec.axes)
        check_conventions(self.config, self.spec, has_attention=bool(self._in_blocks(self.spec.self_attention)))

    def _published(self) -> STGConfig:
        name = self.spec.presets.get(self.num_layers)
        if name is None:
            raise ValueError(
                f"config=None is not allowed: no preset was published for {self.spec.family} "
                f"with {self.num_layers} blocks; pass STGConfig(layers=...)"
            )
        return PRESETS[name].config

    def _install(self) -> None:
        try:
            for module, hook in guided_hooks(self.spec, self.transformer, self.blocks, self._slot, self.memo):
                install(module, hook)
                self._hooked.append(module)
                self._forwards.append((hook, hook.fn_ref.forward))
        except BaseException:
            self.detach()
            raise
        self._forget_child_registries()

    def _forget_child_registries(self) -> None:
        if (registry := getattr(self.transformer, "_diffusers_hook", None)) is not None:
            registry.invalidate_child_registries_cache()


def _max_rows(execution: str, max_rows: int | None) -> int | None:
    if execution not in EXECUTIONS:
        raise ValueError(f"execution={execution!r} is not allowed; choose one of {', '.join(map(repr, EXECUTIONS))}")
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1):
        raise ValueError(f"max_rows={max_rows!r} is not allowed; it must be an integer of at least 1, or None")
    if execution == "serial" and max_rows not in (None, 1):
        raise ValueError(f"max_rows={max_rows} is not allowed with execution='serial', which runs one row at a time")
    return 1 if execution == "serial" else max_rows
