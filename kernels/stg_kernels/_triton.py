"""What the Triton kernels share: token addressing, normalization, launch checks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def table_offset(row, token, row_map_ptr, stride_row, stride_token, HAS_ROW_MAP: tl.constexpr, VEC: tl.constexpr):
    """Offset of a table's vector for (row, token), as int64; VEC elements divide it."""
    if HAS_ROW_MAP:
        row = tl.load(row_map_ptr + row)
    return tl.multiple_of(row.to(tl.int64) * stride_row + token.to(tl.int64) * stride_token, VEC)


@triton.jit
def normalize(
    x,
    columns,
    mask,
    weight_ptr,
    bias_ptr,
    eps,
    C: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """RMSNorm or LayerNorm of one token, float32; lanes outside `mask` must be 0."""
    if SUBTRACT_MEAN:
        x = tl.where(mask, x - tl.sum(x, axis=0) / C, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / C + eps)
    if HAS_WEIGHT:
        x = x * tl.load(weight_ptr + columns, mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x = x + tl.load(bias_ptr + columns, mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def modulate(
    x,
    columns,
    mask,
    row,
    token,
    scale_ptr,
    shift_ptr,
    row_map_ptr,
    scale_row,
    scale_token,
    shift_row,
    shift_token,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_ROW_MAP: tl.constexpr,
    VEC: tl.constexpr,
):
    """`x (1 + scale) + shift` of one token, float32."""
    if HAS_SCALE:
        offset = table_offset(row, token, row_map_ptr, scale_row, scale_token, HAS_ROW_MAP, VEC)
        x = x * (1.0 + tl.load(scale_ptr + offset + columns, mask, other=0.0).to(tl.float32))
    if HAS_SHIFT:
        offset = table_offset(row, token, row_map_ptr, shift_row, shift_token, HAS_ROW_MAP, VEC)
        x = x + tl.load(shift_ptr + offset + columns, mask, other=0.0).to(tl.float32)
    return x


def vector_length(*tensors: Tensor | None) -> int:
    """Elements that divide the offset of every vector in these tensors: 8, a 16-byte access of bfloat16, or 1.

    A compile-time promise: strides are runtime arguments, so that no token or row count compiles anew.
    """
    strides = (stride for tensor in tensors if tensor is not None for stride in tensor.stride()[:-1])
    return 1 if any(stride % 8 for stride in strides) else 8


def outer_strides(table: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of the first `dims` dimensions, 0 where the size is 1 and the table is shared."""
    if table is None:
        return (0,) * dims
    return tuple(0 if size == 1 else stride for size, stride in zip(table.shape[:dims], table.stride(), strict=False))


def warps(elements: int) -> int:
    """8 elements a thread, as one 16-byte access of bfloat16 is; 1 to 16 warps."""
    return max(1, min(16, triton.next_power_of_2(elements) // 256))


def check_device(x: Tensor) -> None:
    """`RuntimeError` on a tensor that Triton cannot reach."""
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"impl='fused' needs CUDA tensors, these are on {x.device}; TRITON_INTERPRET=1 runs it there"
        )


def pointer(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel's argument; any tensor stands in for an absent one, which is not read. Vectors are made contiguous."""
    if tensor is None:
        return stand_in
    return tensor.contiguous() if tensor.ndim == 1 else tensor
