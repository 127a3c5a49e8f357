"""Query/key normalization and rotary embedding in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from stg_kernels.choose import (
    check_beside,
    check_dimensions,
    check_eps,
    check_floating,
    check_required,
    check_row_map,
    check_shape,
    run,
)


def _strides(table: Tensor) -> list[int]:
    return [stride for stride, size in zip(table.stride(), table.shape, strict=True) if size > 1]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
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
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope(norm(q))` and `rope(norm(k))`, the layout kept: no transposes, one launch.

    norm: as in `norm_modulate` with weight and bias, over all heads of a token (LTX-Video, Wan), or over each head
    alone if `per_head` (Mochi, CogVideoX, HunyuanVideo). rope (arXiv 2104.09864) turns pairs (a, b) of a head:
    `a cos - b sin, b cos + a sin`; pair i is (2 i, 2 i + 1) if `interleaved`, else (i, i + D / 2).

    q, k            [R, S, N, D] float32, bfloat16, float16; one shape and dtype; a token's N * D values contiguous;
                    D even
    weights, biases [N * D], or [D] if per_head; q's dtype or float32
    cos, sin        float32 [R or 1, S, N or 1, D / 2] of one shape, one value per pair, a token's values contiguous;
                    both or neither
    row_map         int64 [R]: row r takes cos and sin from row row_map[r], values checked on the CPU alone
    impl            None: the best one for the device; "reference", "fused" (Triton), "native" (C++/CUDA)

    Returns (q, k), each [R, S, N, D] in its dtype, contiguous. float32 arithmetic, one rounding at the end;
    deterministic. Raises `ValueError` for shapes, dtypes, devices or strides other than these, `RuntimeError` if `impl`
    was not built.
    """
    check_required(q=q, k=k)
    check_floating(cos=cos, sin=sin)
    check_beside(q, q=q, k=k, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias)
    check_dimensions("q", q, "R S N D")
    _, tokens, heads, size = q.shape
    for name, x in (("q", q), ("k", k)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"k is {k.dtype} {tuple(k.shape)}; it must be {q.dtype} {tuple(q.shape)}, as q")
        if heads > 1 and x.stride(2) != size:
            raise ValueError(f"{name} has stride {x.stride(2)} between heads; a token's heads must be adjacent, {size}")
    check_eps(eps)
    normed = size if per_head else heads * size
    for name, vector in (("q_weight", q_weight), ("k_weight", k_weight), ("q_bias", q_bias), ("k_bias", k_bias)):
        check_shape(name, vector, (normed,))
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin go together; pass both or neither")
    if size % 2:
        raise ValueError(f"q has head size {size}; it must be even")
    rows = check_row_map(row_map, q, cos=cos, sin=sin)
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None or cos is None:
            continue
        check_beside(q, **{name: table})
        check_shape(name, table, rows, (tokens,), (heads, 1), (size // 2,))
        if table.shape != cos.shape:
            raise ValueError(f"{name} has shape {tuple(table.shape)}; it must be {tuple(cos.shape)}, as cos")
        if table.dtype != torch.float32 or _strides(table) != _strides(cos):
            raise ValueError(
                f"{name} is {table.dtype} with strides {table.stride()}; cos and sin must be float32 alike"
            )
        if table.shape[2] > 1 and table.stride(2) != size // 2:
            raise ValueError(f"{name} has stride {table.stride(2)} between heads; they must be adjacent, {size // 2}")
    arguments = (q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, eps, per_head, subtract_mean, interleaved, row_map)
    return run("qk_norm_rope", impl, q.device, *arguments)
