"""The specification in plain torch; float32 arithmetic, float64 for float64 input."""

from __future__ import annotations

import torch
from torch import Tensor

from stg_kernels.norm_modulate.reference import norm_modulate


def residual_gate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    row_map: Tensor | None = None,
    pass_through: Tensor | None = None,
) -> Tensor:
    """See `stg_kernels.residual_gate`."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    change = y.to(compute)
    if gate is not None:
        change = (gate if row_map is None else gate[row_map]).to(compute) * change
    out = (x.to(compute) + change).to(x.dtype)
    return (out if pass_through is None else torch.where(pass_through[:, None, None], x, out)).contiguous()


def residual_gate_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    subtract_mean: bool = False,
    row_map: Tensor | None = None,
    pass_through: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `stg_kernels.residual_gate_norm_modulate`."""
    out = residual_gate(x, y, gate, row_map, pass_through)
    return out, norm_modulate(out, scale, shift, weight, bias, eps, subtract_mean, row_map)
