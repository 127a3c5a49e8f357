"""Triton: one program per token normalizes and turns q and k; cos and sin are read once for both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stg_kernels._triton import check_device, outer_strides, pointer, table_offset, vector_length, warps

RUNTIME_SIZES = ["tokens", "q_row", "q_token", "k_row", "k_token", "table_row", "table_token"]


@triton.jit
def _sum(x, PER_HEAD: tl.constexpr):
    """Over each head, or over all of them; [N or 1, 1]."""
    total = tl.sum(x, axis=1)
    if PER_HEAD:
        return total[:, None]
    else:
        return tl.sum(total, axis=0)


@triton.jit
def _norm_rope(
    x_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    head,
    column,
    mask,
    cos,
    sin,
    eps,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROPE: tl.constexpr,
):
    offsets = head * D + column
    x = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
    size: tl.constexpr = D if PER_HEAD else N * D
    if SUBTRACT_MEAN:
        x = tl.where(mask, x - _sum(x, PER_HEAD) / size, 0.0)
    x = x * tl.rsqrt(_sum(x * x, PER_HEAD) / size + eps)
    vector = column if PER_HEAD else offsets
    if HAS_WEIGHT:
        x = x * tl.load(weight_ptr + vector, mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x = x + tl.load(bias_ptr + vector, mask, other=0.0).to(tl.float32)
    if HAS_ROPE:
        if INTERLEAVED:
            a, b = tl.split(tl.reshape(x, [BLOCK_N, BLOCK_P, 2]))
            x = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [BLOCK_N, 2 * BLOCK_P])
        else:
            a, b = tl.split(tl.trans(tl.reshape(x, [BLOCK_N, 2, BLOCK_P]), 0, 2, 1))
            x = tl.trans(tl.join(a * cos - b * sin, b * cos + a * sin), 0, 2, 1)
            x = tl.reshape(x, [BLOCK_N, 2 * BLOCK_P])
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _qk_norm_rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_bias_ptr,
    k_bias_ptr,
    cos_ptr,
    sin_ptr,
    row_map_ptr,
    eps,
    tokens,
    q_row,
    q_token,
    k_row,
    k_token,
    table_row,
    table_token,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VEC: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    HAS_Q_BIAS: tl.constexpr,
    HAS_K_BIAS: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    ROPE_PER_HEAD: tl.constexpr,
    HAS_ROW_MAP: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row, token = index // tokens, index % tokens
    head = tl.arange(0, BLOCK_N)[:, None]
    pair = tl.arange(0, BLOCK_P)[None, :]
    lane = tl.arange(0, 2 * BLOCK_P)[None, :]
    # Without interleaving the halves of a head lie BLOCK_P lanes apart, also where D / 2 is no power of two.
    column = lane if INTERLEAVED else lane % BLOCK_P + lane // BLOCK_P * (D // 2)
    mask = (head < N) & (column < D) & (INTERLEAVED | (lane % BLOCK_P < D // 2))
    cos = 1.0
    sin = 0.0
    if HAS_ROPE:
        table = table_offset(row, token, row_map_ptr, table_row, table_token, HAS_ROW_MAP, VEC)
        table = table + pair + head * (D // 2 if ROPE_PER_HEAD else 0)
        inside = (head < N) & (pair < D // 2)
        cos = tl.load(cos_ptr + table, inside, other=0.0)
        sin = tl.load(sin_ptr + table, inside, other=0.0)
    out = index * (N * D)
    _norm_rope(
        q_ptr + tl.multiple_of(row * q_row + token * q_token, VEC), q_out_ptr + out, q_weight_ptr, q_bias_ptr,
        head, column, mask, cos, sin, eps, N, D, BLOCK_N, BLOCK_P,
        PER_HEAD, SUBTRACT_MEAN, INTERLEAVED, HAS_Q_WEIGHT, HAS_Q_BIAS, HAS_ROPE,
    )  # fmt: skip
    _norm_rope(
        k_ptr + tl.multiple_of(row * k_row + token * k_token, VEC), k_out_ptr + out, k_weight_ptr, k_bias_ptr,
        head, column, mask, cos, sin, eps, N, D, BLOCK_N, BLOCK_P,
        PER_HEAD, SUBTRACT_MEAN, INTERLEAVED, HAS_K_WEIGHT, HAS_K_BIAS, HAS_ROPE,
    )  # fmt: skip


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    per_head: bool = False,
    subtract_mean: bool = False,
    interleaved: bool = True,
    row_map: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `stg_kernels.qk_norm_rope`."""
    check_device(q)
    rows, tokens, heads, size = q.shape
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    if q_out.numel() == 0:
        return q_out, k_out
    with torch.cuda.device_of(q):
        _qk_norm_rope_kernel[(rows * tokens,)](
            q,
            k,
            q_out,
            k_out,
            pointer(q_weight, q),
            pointer(k_weight, q),
            pointer(q_bias, q),
            pointer(k_bias, q),
            pointer(cos, q),
            pointer(sin, q),
            pointer(row_map, q),
            eps,
            tokens,
            *q.stride()[:2],
            *k.stride()[:2],
            *outer_strides(cos, 2),
            N=heads,
            D=size,
            BLOCK_N=triton.next_power_of_2(heads),
            BLOCK_P=triton.next_power_of_2(max(1, size // 2)),
            VEC=vector_length(q, k, q_out, k_out, cos, sin),
            PER_HEAD=per_head,
            SUBTRACT_MEAN=subtract_mean,
            INTERLEAVED=interleaved,
            HAS_Q_WEIGHT=q_weight is not None,
            HAS_K_WEIGHT=k_weight is not None,
            HAS_Q_BIAS=q_bias is not None,
            HAS_K_BIAS=k_bias is not None,
            HAS_ROPE=cos is not None,
            ROPE_PER_HEAD=cos is not None and cos.shape[2] > 1,
            HAS_ROW_MAP=row_map is not None,
            num_warps=warps(heads * size),
        )
    return q_out, k_out
