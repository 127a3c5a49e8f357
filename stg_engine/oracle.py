"""How predictions combine, written a second time and without regard to speed: what `guidance` is checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.config import StepGuidance, STGConfig
from stg_engine.models import spec_of


def combined(
    transformer: nn.Module,
    config: STGConfig,
    step: StepGuidance,
    branches: Any,
    inputs: Mapping[str, Any],
    guidance_scale: float | Tensor,
    levels: Sequence[Any],
) -> Any:
    """The branches of `passes_one_by_one`, guided by the formula of `three_passes`.

    inputs   of the transformer, that hold the latents; levels: per output its noise level sigma, or None
    """
    spec = spec_of(transformer)
    latents = [inputs[name] for name in spec.velocity_of or spec.latents[:1]]
    outputs = branches if isinstance(branches, tuple) else (branches,)
    guided = []
    for i, (of_output, x, level) in enumerate(zip(outputs, latents, levels, strict=True)):
        audio = step.audio if i > 0 else None
        scales = [skip.scale if audio is None or audio.scale is None else audio.scale for skip in step.skips]
        g, mu, r = guidance_scale, step.modality_scale, step.rescale
        if audio is not None:
            g = g if audio.guidance_scale is None else audio.guidance_scale
            mu = mu if audio.modality_scale is None else audio.modality_scale
            r = r if audio.rescale is None else audio.rescale
        guided.append(_combined(config, step.is_plain, of_output, scales, g, mu, r, x, level))
    return one_or_all(guided)


def _combined(
    config: STGConfig,
    is_plain: bool,
    branches: dict[str, Tensor],
    scales: Sequence[float],
    guidance_scale: float | Tensor,
    modality_scale: float,
    rescale: float,
    x: Tensor,
    level: Any,
) -> Tensor:
    """One output's branches, by the formula of `three_passes`."""
    dtype = branches["cond"].dtype
    if config.arithmetic == "float32":
        branches = {name: p.to(torch.promote_types(dtype, torch.float32)) for name, p in branches.items()}
    if config.space == "x0" and not is_plain:
        x = x.to(branches["cond"].dtype)
        branches = {name: x - level * p for name, p in branches.items()}
    out = c = branches["cond"]
    if "uncond" in branches:
        u = branches["uncond"]
        if config.cfg_star and not is_plain:
            u = _per_video((c * u).flatten(1).sum(1) / (u.flatten(1).square().sum(1) + 1e-8), u) * u
        out = u + guidance_scale * (c - u)
    before = out if config.weak_pass == "negative_prompt" else c
    for scale, name in zip(scales, names_of(scales), strict=True):
        if name in branches:
            out = out + scale * (before - branches[name])
    if "modality" in branches:
        out = out + (modality_scale - 1) * (c - branches["modality"])
    if rescale > 0 and config.rescale_over == "sample":
        ratio = torch.stack([c_i.std() / out_i.std() for c_i, out_i in zip(c, out, strict=True)])
        out = out * (rescale * _per_video(ratio, out) + (1 - rescale))
    elif rescale > 0:
        out = out * (rescale * c.std() / out.std() + (1 - rescale))
    if config.space == "x0" and not is_plain:
        out = from_x0(out, x, level)
    return out.to(dtype)


def one_or_all(values: Sequence[Any]) -> Any:
    """What there is of each output: itself if there is one output, else a tuple."""
    return values[0] if len(values) == 1 else tuple(values)


def _per_video(numbers: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to multiply `like` with."""
    return numbers.view(-1, *[1] * (like.ndim - 1))


def from_x0(clean: Tensor, x: Tensor, level: Any) -> Tensor:
    """v of `x0 = x - sigma v`; tokens with sigma 0 do not move."""
    v = (x - clean) / level
    return torch.where(torch.isfinite(v), v, torch.zeros_like(v))


def names_of(skips: Sequence[Any]) -> list[str]:
    """Of the skip branches, in order."""
    return ["skip" if i == 0 else f"skip{i + 1}" for i in range(len(skips))]
