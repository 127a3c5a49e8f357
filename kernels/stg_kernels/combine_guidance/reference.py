"""The specification in plain torch; float32 arithmetic, float64 for float64 rows."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_guidance(
    rows: Tensor,
    scales: Tensor,
    has_uncond: bool,
    rescale: bool = False,
    over_batch: bool = False,
    cfg_star: bool = False,
    dtype: torch.dtype | None = None,
    latents: Tensor | None = None,
    dt: Tensor | None = None,
) -> Tensor:
    """See `stg_kernels.combine_guidance`."""
    compute = torch.float64 if rows.dtype == torch.float64 else torch.float32
    branches = scales.numel() - 1 + has_uncond
    predictions = rows.to(compute).unflatten(0, (branches, -1))
    g, r, *skip_scales = scales.to(compute).unbind()
    cond = predictions[int(has_uncond)]
    dims = tuple(range(1, cond.ndim))
    out = cond.clone()  # a result of its own, also where nothing is added
    if has_uncond:
        uncond = predictions[0]
        if cfg_star:
            dot = (cond * uncond).sum(dims, keepdim=True)
            uncond = dot / (uncond.square().sum(dims, keepdim=True) + 1e-8) * uncond
        out = uncond + g * (cond - uncond)
    for scale, skip in zip(skip_scales, predictions[1 + has_uncond :], strict=True):
        out = out + scale * (cond - skip)
    if rescale:
        over = (0, *dims) if over_batch else dims
        ratio = cond.std(over, keepdim=True) / out.std(over, keepdim=True)
        out = out * (r * ratio + (1 - r))
    if latents is not None and dt is not None:
        return (latents.to(compute) + dt.to(compute) * out).to(latents.dtype)
    return out.to(dtype or rows.dtype)
