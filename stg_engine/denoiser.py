"""A transformer and a config -> the guided prediction, for loops of your own and for `stg_engine.attach`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine import guidance
from stg_engine.config import StepGuidance, STGConfig, number
from stg_engine.inputs import Inputs, all_rows, check_inputs
from stg_engine.memo import Memo, weights_fingerprint
from stg_engine.models import spec_of
from stg_engine.once import OncePerPrompt, OncePerStep, PerRow, TimeEmbedding
from stg_engine.plan import Plan, Plans, build_plans, check_layers
from stg_engine.presets import PRESETS
from stg_engine.rows import BlockHook, Run, SelfAttentionHook, Slot, install, is_installed, remove

EXECUTIONS = ("batched", "serial")
KERNELS = ("auto", "off")


class Denoiser:
    """Guided predictions of a transformer whose branches run as rows of one forward.

    transformer  a supported diffusers transformer, in eval mode; hooked until `detach()`, never replaced
    config       an `STGConfig`; None takes the preset published for the model
    execution    "batched": all rows of a block at once; "serial": a block row by row, least memory, every branch
                 bitwise equal to its pass run alone on that video
    max_rows     at most this many rows at once; serial is max_rows=1
    kernels      "auto": fused kernels where they exist for family and device (none yet); "off": the modules as they are

    What follows from prompt and weights alone is kept from step to step; call `release()` after writing weights through
    `weight.data`. `differences` holds, per skip branch, max |c - p| of its first step, a scalar tensor: 0 means that
    the skip changes nothing.

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
    ) -> None:
        if hasattr(transformer, "_orig_mod"):
            raise TypeError(
                "transformer is a torch.compile module; hook the module that was compiled, transformer._orig_mod"
            )
        self.spec = spec_of(transformer)
        self.transformer = transformer
        self.blocks = self.spec.block_list(transformer)
        if any(hasattr(block, "_orig_mod") for block in self.blocks):
            raise TypeError("transformer holds blocks that are torch.compile modules; put the blocks themselves back")
        self.config = self._published() if config is None else config
        self.max_rows = _max_rows(execution, max_rows)
        self.execution, self.kernels = execution, kernels
        if kernels not in KERNELS:
            raise ValueError(f"kernels={kernels!r} is not allowed; choose one of {', '.join(map(repr, KERNELS))}")
        self._check_config()
        if is_installed(self.blocks[0]):
            raise ValueError("transformer has a Denoiser already; detach it first")
        self.memo = Memo()
        self.differences: dict[str, Tensor] = {}
        self._slot = Slot()
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
        guidance_scale: float | None = None,
        progress: float | None = None,
        sigma: float | None = None,
    ) -> Any:
        """`u + g (c - u) + sum_i s_i (c - p_i)` and the rescale, in the transformer's own output shape and dtype.

        shared          the transformer's keyword arguments that all branches have in common (B videos)
        cond, uncond    those that depend on the prompt; without uncond the result is `c + sum_i s_i (c - p_i)`
        guidance_scale  g; needed with uncond, not allowed without it (except 1); a schedule's entry may set it
        progress        step index / number of steps, in [0, 1); needed if the config has start or stop
        sigma           noise level of this step, 1 is pure noise; needed if the config has a schedule
        """
        step = self.config.at(progress, sigma)
        if step.guidance_scale is not None:
            guidance_scale, uncond = (step.guidance_scale, uncond) if step.guidance_scale > 1 else (None, None)
        if guidance_scale is not None:
            number("guidance_scale", guidance_scale, 0.0)
        if uncond is not None and guidance_scale is None:
            raise ValueError("guidance_scale=None is not allowed with uncond; pass g of u + g (c - u)")
        if uncond is None and guidance_scale not in (None, 1, 1.0):
            raise ValueError(f"guidance_scale={guidance_scale} needs uncond, which is None")
        outputs = self.predict(step, shared, cond, uncond)
        scale = 1.0 if guidance_scale is None else guidance_scale
        return _map(lambda branches: self.combine(step, branches, scale).to(branches["cond"].dtype), outputs)

    def branches(
        self,
        shared: Inputs,
        cond: Inputs,
        uncond: Inputs | None = None,
        *,
        progress: float | None = None,
        sigma: float | None = None,
    ) -> Any:
        """The predictions before they are combined: {"cond": ..., "uncond": ..., "skip": ..., "skip2": ...}."""
        return self.predict(self.config.at(progress, sigma), shared, cond, uncond)

    def plan(self, step: StepGuidance, *, uncond: bool = True) -> Plan:
        """Rows per block for one step's guidance."""
        key = (step, uncond)
        if key not in self._plans:
            self._plans[key] = Plan.build(step, len(self.blocks), uncond=uncond, **self._plan_options())
        return self._plans[key]

    def plans(self, guidance_scale: float | None = None) -> Plan | Plans:
        """The config's plan while its skips are on, without uncond if `guidance_scale` <= 1; a schedule's plans."""
        if self.config.schedule is not None:
            return build_plans(self.config, len(self.blocks), guidance_scale=guidance_scale, **self._plan_options())
        uncond = guidance_scale is None or guidance_scale > 1
        return Plan.build(self.config, len(self.blocks), uncond=uncond, **self._plan_options())

    def release(self) -> None:
        """Drop what is kept from step to step: prompt keys and values, caption projection."""
        self.memo.clear()

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
    ) -> Any:
        """Run the branches of one step; `forward` stands in for the transformer's own (a hook's inner forward)."""
        if not self._hooked:
            raise RuntimeError("this Denoiser is detached; make a new one")
        forward = self.transformer if forward is None else forward
        videos = check_inputs(self.transformer, self.spec, shared, cond, uncond)
        plan = self.plan(step, uncond=uncond is not None)
        names = tuple(branch.name for branch in plan.branches)
        if not step.skips:  # plain diffusers, whatever else is on
            rows = all_rows(self.spec, names, shared, cond, uncond)
            return self._by_branch(forward(**rows, return_dict=False), names)
        self._refuse_other_hooks()
        self._refuse_lost_hooks()
        try:
            prompt = [*cond.values(), *(() if uncond is None else uncond.values())]
            self.memo.keep_only(self._source(shared), prompt)
            self._slot.run = Run(plan, self.spec, videos, self.max_rows, self.memo)
            rows = all_rows(self.spec, names, shared, cond, uncond, self.memo)
            outputs = self._by_branch(forward(**rows, return_dict=False), names)
        except BaseException:
            self.release()
            raise
        finally:
            self._slot.run = None
        self._note_differences(step, outputs)
        return outputs

    def combine(
        self, step: StepGuidance, branches: Mapping[str, Tensor], guidance_scale: float, rescale: float = 0.0
    ) -> Tensor:
        """`guidance.combine` with this config's conventions; float32. `rescale` stands in where the step has none."""
        return guidance.combine(
            branches["cond"],
            branches.get("uncond"),
            [(branches[name], skip.scale) for name, skip in zip(step.names, step.skips, strict=True)],
            guidance_scale=guidance_scale,
            rescale=step.rescale or rescale,
            cfg_star=self.config.cfg_star,
            rescale_over=self.config.rescale_over,
            arithmetic=self.config.arithmetic,
        )

    def _by_branch(self, outputs: tuple[Tensor, ...], names: tuple[str, ...]) -> Any:
        branches = tuple(dict(zip(names, output.chunk(len(names)), strict=True)) for output in outputs)
        return branches if len(branches) > 1 else branches[0]

    def _note_differences(self, step: StepGuidance, outputs: Any) -> None:
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        for name in step.names:
            if name not in self.differences:
                self.differences[name] = guidance.largest_difference(first["cond"], first[name])

    def _source(self, shared: Inputs) -> Any:
        """All that the prompt's keys and values follow from but the prompt."""
        paths, paths_in_block = self.spec.once_per_prompt, self.spec.once_per_prompt_in_block
        modules = [self.transformer.get_submodule(path) for path in paths]
        modules += [block.get_submodule(path) for block in self.blocks for path in paths_in_block]
        kind = shared[self.spec.latents[0]].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        # The LoRA scale in attention_kwargs acts inside the forward, after this fingerprint.
        return weights_fingerprint(modules), autocast, repr(shared.get("attention_kwargs"))

    def _check_config(self) -> None:
        if not isinstance(self.config, STGConfig):
            raise TypeError(f"config={self.config!r} is not allowed; it must be an STGConfig")
        for skip in self.config.skips:
            check_layers(skip, len(self.blocks))
            if skip.axis is not None:
                raise ValueError(f"axis={skip.axis!r} is not allowed: {self.spec.family} has no factorised attention")

    def _published(self) -> STGConfig:
        name = self.spec.presets.get(len(self.blocks))
        if name is None:
            raise ValueError(
                f"config=None is not allowed: no preset was published for {self.spec.family} "
                f"with {len(self.blocks)} blocks"
            )
        return PRESETS[name].config

    def _plan_options(self) -> dict[str, Any]:
        return {"prompt_block": self.spec.prompt_block, "shares_attention": self.spec.shares_attention}

    def _refuse_other_hooks(self) -> None:
        for module in self.transformer.modules():
            for hook in getattr(vars(module).get("_diffusers_hook"), "hooks", {}).values():
                if hook._is_stateful:
                    raise RuntimeError(
                        f"a diffusers feature cache is on the transformer ({type(hook).__name__}); it keeps results of "
                        "a fixed batch and mixes up branches whose rows come and go. Switch it off "
                        "(transformer.disable_cache() if enable_cache() put it there), or set scale=0.0"
                    )
        if any(vars(module).get("_compiled_call_impl") for module in (self.transformer, *self._hooked)):
            raise RuntimeError(
                "the transformer or its blocks are compiled (compile(), compile_repeated_blocks()), which stg_engine "
                "does not support yet; attach to a transformer that is not compiled, or set scale=0.0"
            )
        if torch.is_grad_enabled() and getattr(self.transformer, "gradient_checkpointing", False):
            raise RuntimeError(
                "gradient checkpointing runs blocks again after the guided forward has ended; call "
                "transformer.disable_gradient_checkpointing(), or run under torch.no_grad()"
            )

    def _refuse_lost_hooks(self) -> None:
        for hook, forward in self._forwards:
            if hook.fn_ref.forward is not forward:
                raise RuntimeError(
                    "another hook was taken off the transformer and took stg_engine's with it (diffusers puts an older "
                    "forward back, for example in disable_cache()); detach and attach again"
                )

    def _install(self) -> None:
        hooks: list[tuple[nn.Module, Any]] = []
        for path, rows in self.spec.once_per_step.items():
            hooks.append((self.transformer.get_submodule(path), OncePerStep(self._slot, rows)))
        if self.spec.time_embedding is not None:
            hooks.append((self.transformer.get_submodule(self.spec.time_embedding), TimeEmbedding(self._slot)))
        for path in self.spec.once_per_prompt:
            hooks.append((self.transformer.get_submodule(path), OncePerPrompt(self._slot, self.memo)))
        for path in self.spec.per_row:
            hooks.append((self.transformer.get_submodule(path), PerRow(self._slot)))
        for index, block in enumerate(self.blocks):
            hooks.append((block, BlockHook(self._slot, index)))
            hooks.append((block.get_submodule(self.spec.self_attention), SelfAttentionHook(self._slot, index)))
            for path in self.spec.once_per_prompt_in_block:
                hooks.append((block.get_submodule(path), OncePerPrompt(self._slot, self.memo)))
        try:
            for module, hook in hooks:
                install(module, hook)
                self._hooked.append(module)
                self._forwards.append((hook, hook.fn_ref.forward))
        except BaseException:
            self.detach()
            raise
        self._forget_child_registries()

    def _forget_child_registries(self) -> None:
        registry = getattr(self.transformer, "_diffusers_hook", None)
        if registry is not None:
            registry.invalidate_child_registries_cache()


def _max_rows(execution: str, max_rows: int | None) -> int | None:
    if execution not in EXECUTIONS:
        raise ValueError(f"execution={execution!r} is not allowed; choose one of {', '.join(map(repr, EXECUTIONS))}")
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1):
        raise ValueError(f"max_rows={max_rows!r} is not allowed; it must be an integer of at least 1, or None")
    if execution == "serial" and max_rows not in (None, 1):
        raise ValueError(f"max_rows={max_rows} is not allowed with execution='serial', which runs one row at a time")
    return 1 if execution == "serial" else max_rows


def _map(function: Callable[[Mapping[str, Tensor]], Tensor], outputs: Any) -> Any:
    return tuple(map(function, outputs)) if isinstance(outputs, tuple) else function(outputs)
