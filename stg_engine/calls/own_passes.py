"""Pipelines that run the weak passes as calls of their own and combine them by themselves, in x0 space: LTX-2.

One forward answers all calls of a step. The first call gets its rows of it; what was computed for the others is kept
until they ask. Scales, rescale and every operation of the guidance stay the pipeline's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stg_engine.calls.base import Calls, Step
from stg_engine.config import Skip, StepGuidance, STGConfig
from stg_engine.denoiser import Denoiser
from stg_engine.inputs import split_rows
from stg_engine.plan import Plan, Plans

OF_A_PASS = ("isolate_modalities", "spatio_temporal_guidance_blocks", "perturbation_mask", "return_dict")
"""The model's arguments that say which pass it is and how it is returned."""


class OwnPasses(Calls):
    """[uncond, cond], then the STG pass, then the pass in which the modalities are isolated; each may be off.

    With `attach(pipe)` the passes are the pipeline's. Which blocks STG perturbs is a local of its call, so the loop's
    first STG pass runs as it is and shows them; where diffusers ignores them, p = c. A pass of an unknown kind, or on
    other inputs than the step's first, runs as it is too.

    With a config, its skips take the place of the STG pass, and `modality_scale` that of the pipeline's unless it is 1:
    the pipeline multiplies by the config's scales what it gets for its own passes. Of several skips it gets
    p = sum_i s_i p_i / s, s = sum_i s_i; in steps without skips p = c.
    """

    most = 3
    own = STGConfig(layers=(0,), scale=0.0)
    sees_plain_steps = True

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._layers: tuple[int, ...] | None = None
        self._inputs: dict[str, Any] = {}
        self._kept: dict[str, tuple[Tensor, ...]] = {}

    def guidance(self, planned: StepGuidance, config: STGConfig) -> StepGuidance:
        pipe, skips = self.pipe, planned.skips
        if config is self.own:
            layers = self._layers if pipe.do_spatio_temporal_guidance else None
            skips = (Skip(layers, mode="attention"),) if layers else ()
        else:
            # Never off: the pipeline takes its prompt apart in the first step alone, and only if a pass is on there.
            pipe._stg_scale = pipe._audio_stg_scale = sum(skip.scale for skip in skips) or 1.0
        if config.modality_scale != 1:
            pipe._modality_scale = pipe._audio_modality_scale = config.modality_scale
            return StepGuidance(skips, modality_scale=planned.modality_scale)
        return StepGuidance(skips, modality_scale=2.0 if pipe.do_modality_isolation_guidance else 1.0)

    def plans(self, denoiser: Denoiser) -> Plan | Plans:
        config = denoiser.config
        self._refuse_arithmetic(config)
        if config.schedule is not None:
            return super().plans(denoiser)
        planned = StepGuidance(tuple(s for s in config.skips if s.scale > 0), modality_scale=config.modality_scale)
        return denoiser.plan(self.guidance(planned, config), uncond=bool(self.has_uncond()))

    def rescale(self) -> float:
        return 0.0  # the pipeline's own is its own; a config's is refused

    def predict(self, step: Step, arguments: dict[str, Any]) -> Any:
        return_dict = arguments.get("return_dict", True)
        kind, inputs = self._kind_of(step, arguments), {k: v for k, v in arguments.items() if k not in OF_A_PASS}
        if step.call == 0:
            self._inputs, self._kept = {}, {}
            if kind == "first":
                return _output(self._first(step, inputs), return_dict=return_dict)
        if kind == "skip" and step.denoiser.config is self.own:
            self._learn_layers(step, arguments["spatio_temporal_guidance_blocks"])
        if kind in self._kept and _are_equal(inputs, self._inputs):
            return _output(self._kept.pop(kind), return_dict=return_dict)
        return step.forward(**arguments)

    def _kind_of(self, step: Step, arguments: dict[str, Any]) -> str:
        blocks, is_isolated = arguments.get("spatio_temporal_guidance_blocks"), arguments.get("isolate_modalities")
        if arguments.get("perturbation_mask") is not None or (blocks and is_isolated):
            return "unknown"
        # With a config the STG pass may be one that the pipeline was not asked for, and has no blocks for.
        is_skip = blocks or (step.call == 1 and step.denoiser.config is not self.own)
        return "modality" if is_isolated else "skip" if is_skip else "first"

    def _first(self, step: Step, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """All branches; the rows [uncond, cond] or [cond] of every output."""
        denoiser, guidance, copies = step.denoiser, step.guidance, 2 if self.has_uncond() else 1
        shared, cond, uncond = split_rows(denoiser.spec, inputs, copies)
        names, outputs = denoiser.predict(guidance, shared, cond, uncond, step.forward)
        branches = [dict(zip(names, rows.chunk(len(names)), strict=True)) for rows in outputs]
        self._inputs = {**shared, **cond}
        weak = {"skip": guidance.weak[: len(guidance.skips)], "modality": guidance.weak[len(guidance.skips) :]}
        if denoiser.config is self.own and self._layers is None:
            del weak["skip"]
        self._kept = {kind: tuple(_weak(each, weights) for each in branches) for kind, weights in weak.items()}
        if self._layers == ():
            denoiser.differences.setdefault("skip", outputs[0].new_zeros(()))
        return tuple(rows[: copies * len(rows) // len(names)] for rows in outputs)

    def _learn_layers(self, step: Step, blocks: Sequence[int]) -> None:
        """What the pass perturbs: diffusers passes over blocks that are not there, and over all if the config says."""
        is_perturbed = step.denoiser.transformer.config.perturbed_attn
        count = step.denoiser.num_layers if is_perturbed else 0
        layers = tuple(sorted({block for block in blocks if 0 <= block < count}))
        if layers != self._layers:
            self._layers = layers
            self._kept.pop("skip", None)

    def _refuse_arithmetic(self, config: STGConfig) -> None:
        entries = () if config.schedule is None else config.schedule.entries
        for field, is_used, own in (
            ("rescale", config.rescale > 0, "guidance_rescale and audio_guidance_rescale"),
            ("schedule", any(e.rescale > 0 or e.guidance_scale is not None for e in entries), "guidance_scale"),
            ("cfg_star", config.cfg_star, ""),
            ("arithmetic", config.arithmetic != "float32", ""),
            ("weak_pass", config.weak_pass != "prompt", ""),
            ("zero_init", config.zero_init < 1, ""),
            ("audio", config.audio is not None, "audio_guidance_scale, audio_stg_scale and audio_modality_scale"),
        ):
            if is_used:
                instead = f"call it with {own}" if own else "use a Denoiser in a loop of your own"
                raise ValueError(
                    f"{field}={getattr(config, field)!r} is not allowed with {type(self.pipe).__name__}, which "
                    f"combines the passes by itself; leave it out, and {instead}"
                )


def _weak(branches: dict[str, Tensor], weights: Sequence[tuple[str, float]]) -> Tensor:
    """`sum_i s_i p_i / sum_i s_i`, c where there is none."""
    if len(weights) < 2:
        return branches[weights[0][0] if weights else "cond"]
    total = sum(weight for _, weight in weights)
    return torch.stack([branches[name].float() * (weight / total) for name, weight in weights]).sum(0)


def _are_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two calls have the same inputs. Waits for the device where the tensors are not the same memory."""
    return a.keys() == b.keys() and all(_is_equal(a[name], b[name]) for name in a)


def _is_equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)


def _output(tensors: tuple[Tensor, ...], *, return_dict: bool) -> Any:
    if not return_dict:
        return tensors
    from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput

    return AudioVisualModelOutput(*tensors)
