"""Triton: one program per token, one read and one write of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stg_kernels._triton import check_device, modulate, normalize, outer_strides, pointer, vector_length, warps

RUNTIME_SIZES = ["tokens", "x_row", "x_token", "scale_row", "scale_token", "shift_row", "shift_token"]


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _norm_modulate_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    row_map_ptr,
    eps,
    tokens,
    x_row,
    x_token,
    scale_row,
    scale_token,
    shift_row,
    shift_token,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_MAP: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row, token = index // tokens, index % tokens
    columns = tl.arange(0, BLOCK)
    mask = columns < C
    x_offset = tl.multiple_of(row * x_row + token * x_token, VEC)
    x = tl.load(x_ptr + x_offset + columns, mask, other=0.0).to(tl.float32)
    x = normalize(x, columns, mask, weight_ptr, bias_ptr, eps, C, SUBTRACT_MEAN, HAS_WEIGHT, HAS_BIAS)
    x = modulate(
        x, columns, mask, row, token, scale_ptr, shift_ptr, row_map_ptr, scale_row, scale_token, shift_row, shift_token,
        HAS_SCALE, HAS_SHIFT, HAS_ROW_MAP, VEC,
    )  # fmt: skip
    tl.store(out_ptr + index * C + columns, x.to(out_ptr.dtype.element_ty), mask)


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
    check_device(x)
    rows, tokens, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        _norm_modulate_kernel[(rows * tokens,)](
            x,
            out,
            pointer(scale, x),
            pointer(shift, x),
            pointer(weight, x),
            pointer(bias, x),
            pointer(row_map, x),
            eps,
            tokens,
            *x.stride()[:2],
            *outer_strides(scale, 2),
            *outer_strides(shift, 2),
            C=channels,
            BLOCK=triton.next_power_of_2(channels),
            VEC=vector_length(x, out, scale, shift, weight, bias),
            SUBTRACT_MEAN=subtract_mean,
            HAS_SCALE=scale is not None,
            HAS_SHIFT=shift is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_ROW_MAP=row_map is not None,
            num_warps=warps(channels),
        )
    return out
