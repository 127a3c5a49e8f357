"""How predictions combine. Pure functions on tensors; every reduction is per video unless said otherwise.

Shapes: each prediction [B, ...], one entry per video, in the model's own output space (velocity for flow models).
Equation numbers: Hyung et al., Spatiotemporal Skip Guidance, arXiv 2411.18664.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(
    cond: Tensor,
    uncond: Tensor | None,
    skips: Sequence[tuple[Tensor, float]],
    *,
    guidance_scale: float | Tensor = 1.0,
    rescale: float = 0.0,
    cfg_star: bool = False,
    rescale_over: str = "sample",
    arithmetic: str = "float32",
) -> Tensor:
    """`u + g (c - u) + sum_i s_i (c - p_i)`, then the std-rescale; `c + sum_i s_i (c - p_i)` if uncond is None.

    The paper gives CFG (Eq. 6) and the skip term (Eq. 13) on their own; their sum is the published codes' convention.
    Returns float32 [B, ...], float64 for float64; rounded to the predictions' dtype between operations only if
    arithmetic is "model".
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    if arithmetic == "float32":
        cond = cond.to(wide)
        uncond = None if uncond is None else uncond.to(wide)
        skips = [(skip.to(wide), scale) for skip, scale in skips]
    guided = cond
    if uncond is not None:
        if cfg_star:
            uncond = cfg_star_alpha(cond.to(wide), uncond.to(wide)).to(uncond.dtype) * uncond  # |u|^2 overflows fp16
        guided = uncond + guidance_scale * (cond - uncond)
    for skip, scale in skips:
        guided = guided + scale * (cond - skip)
    if rescale > 0:
        guided = guided * rescale_factor(cond, guided, rescale, over=rescale_over)
    return guided.to(wide)


def skip_term(cond: Tensor, skips: Sequence[tuple[Tensor, float]]) -> Tensor:
    """`sum_i s_i (c - p_i)` (Eq. 13), in the predictions' shape and dtype."""
    term = torch.zeros_like(cond)
    for skip, scale in skips:
        term = term + scale * (cond - skip)
    return term


def rescale_factor(cond: Tensor, guided: Tensor, rescale: float, *, over: str = "sample") -> Tensor:
    """`r std(c) / std(guided) + 1 - r` (Alg. 4), unbiased std over all but dim 0, or over everything if over="batch".

    Returns [B, 1, ...] or, over="batch", a scalar tensor.
    """
    dims = tuple(range(1, cond.ndim)) if over == "sample" else tuple(range(cond.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return rescale * ratio + (1.0 - rescale)


def cfg_star_alpha(cond: Tensor, uncond: Tensor) -> Tensor:
    """`<c, u> / (|u|^2 + 1e-8)` per video, [B, 1, ...] (CFG-star, Lightricks/LTX-Video `cfg_star_rescale`)."""
    dims = tuple(range(1, cond.ndim))
    return (cond * uncond).sum(dims, keepdim=True) / (uncond.square().sum(dims, keepdim=True) + 1e-8)


def largest_difference(cond: Tensor, skip: Tensor) -> Tensor:
    """`max |c - p|`, a scalar on the predictions' device; 0 means that the skip changed nothing."""
    return torch.linalg.vector_norm((cond - skip).float(), ord=torch.inf)
