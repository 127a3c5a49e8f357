"""The specification in plain torch; float32 arithmetic, float64 for float64 input."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    subtract_mean: bool = False,
    row_map: Tensor | None = None,
) -> Tensor:
    """See `stg_kernels.norm_modulate`."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32

    def of_rows(modulation: Tensor) -> Tensor:
        return (modulation if row_map is None else modulation[row_map]).to(compute)

    out = x.to(compute)
    if subtract_mean:
        out = out - out.mean(-1, keepdim=True)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(compute)
    if bias is not None:
        out = out + bias.to(compute)
    if scale is not None:
        out = out * (1 + of_rows(scale))
    if shift is not None:
        out = out + of_rows(shift)
    return out.to(x.dtype).contiguous()
