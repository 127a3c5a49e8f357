"""Triton: one program per token; the norm that follows reads the token from registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stg_kernels._triton import (
    check_device,
    modulate,
    normalize,
    outer_strides,
    pointer,
    table_offset,
    vector_length,
    warps,
)

RUNTIME_SIZES = [
    "tokens", "x_row", "x_token", "y_row", "y_token", "gate_row", "gate_token", "scale_row", "scale_token",
    "shift_row", "shift_token",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _residual_gate_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    norm_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    row_map_ptr,
    pass_through_ptr,
    eps,
    tokens,
    x_row,
    x_token,
    y_row,
    y_token,
    gate_row,
    gate_token,
    scale_row,
    scale_token,
    shift_row,
    shift_token,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    WITH_NORM: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_MAP: tl.constexpr,
    HAS_PASS_THROUGH: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row, token = index // tokens, index % tokens
    columns = tl.arange(0, BLOCK)
    mask = columns < C
    x = tl.load(x_ptr + tl.multiple_of(row * x_row + token * x_token, VEC) + columns, mask, other=0.0)
    change = tl.load(y_ptr + tl.multiple_of(row * y_row + token * y_token, VEC) + columns, mask, other=0.0)
    change = change.to(tl.float32)
    if HAS_GATE:
        offset = table_offset(row, token, row_map_ptr, gate_row, gate_token, HAS_ROW_MAP, VEC)
        change = change * tl.load(gate_ptr + offset + columns, mask, other=0.0).to(tl.float32)
    out = (x.to(tl.float32) + change).to(out_ptr.dtype.element_ty)
    if HAS_PASS_THROUGH:
        out = tl.where(tl.load(pass_through_ptr + row) != 0, x, out)
    tl.store(out_ptr + index * C + columns, out, mask)
    if WITH_NORM:
        norm = normalize(
            out.to(tl.float32), columns, mask, weight_ptr, bias_ptr, eps, C, SUBTRACT_MEAN, HAS_WEIGHT, HAS_BIAS
        )
        norm = modulate(
            norm, columns, mask, row, token, scale_ptr, shift_ptr, row_map_ptr,
            scale_row, scale_token, shift_row, shift_token, HAS_SCALE, HAS_SHIFT, HAS_ROW_MAP, VEC,
        )  # fmt: skip
        tl.store(norm_ptr + index * C + columns, norm.to(norm_ptr.dtype.element_ty), mask)


def residual_gate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    row_map: Tensor | None = None,
    pass_through: Tensor | None = None,
) -> Tensor:
    """See `stg_kernels.residual_gate`."""
    return _launch(x, y, gate, None, None, None, None, 0.0, False, row_map, pass_through, with_norm=False)[0]


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
    return _launch(x, y, gate, scale, shift, weight, bias, eps, subtract_mean, row_map, pass_through, with_norm=True)


def _launch(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    subtract_mean: bool,
    row_map: Tensor | None,
    pass_through: Tensor | None,
    *,
    with_norm: bool,
) -> tuple[Tensor, Tensor]:
    check_device(x)
    rows, tokens, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    norm = torch.empty_like(out) if with_norm else out
    if out.numel() == 0:
        return out, norm
    with torch.cuda.device_of(x):
        _residual_gate_kernel[(rows * tokens,)](
            x,
            y,
            out,
            norm,
            pointer(gate, x),
            pointer(scale, x),
            pointer(shift, x),
            pointer(weight, x),
            pointer(bias, x),
            pointer(row_map, x),
            x if pass_through is None else pass_through.contiguous().view(torch.uint8),
            eps,
            tokens,
            *x.stride()[:2],
            *y.stride()[:2],
            *outer_strides(gate, 2),
            *outer_strides(scale, 2),
            *outer_strides(shift, 2),
            C=channels,
            BLOCK=triton.next_power_of_2(channels),
            VEC=vector_length(x, y, out, gate, scale, shift, weight, bias),
            WITH_NORM=with_norm,
            SUBTRACT_MEAN=subtract_mean,
            HAS_GATE=gate is not None,
            HAS_SCALE=scale is not None,
            HAS_SHIFT=shift is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_ROW_MAP=row_map is not None,
            HAS_PASS_THROUGH=pass_through is not None,
            num_warps=warps(channels),
        )
    return out, norm
