"""Normalization and AdaLN modulation in one pass."""

from __future__ import annotations

from torch import Tensor

from stg_kernels.choose import (
    check_beside,
    check_dimensions,
    check_eps,
    check_required,
    check_row_map,
    check_shape,
    run,
)


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    subtract_mean: bool = False,
    row_map: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """`norm(x) * (1 + scale) + shift` over the last dimension, one read of x and one write.

    norm(x) = (x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias; m is the mean of x if `subtract_mean` (LayerNorm,
    arXiv 1607.06450), else 0 (RMSNorm, arXiv 1910.07467). Absent scale, shift, weight and bias change nothing.

    x             [R, S, C] float32, bfloat16, float16; last dimension contiguous, any other strides
    scale, shift  [R or 1, S or 1, C], x's dtype or float32 (AdaLN, arXiv 2212.09748)
    weight, bias  [C], x's dtype or float32
    row_map       int64 [R]: row r takes scale and shift from row row_map[r] of theirs, values checked on the CPU alone
    impl          None: the best one for the device; "reference", "fused" (Triton), "native" (C++/CUDA)

    Returns [R, S, C] in x's dtype, contiguous. float32 arithmetic, one rounding at the end; deterministic.
    Raises `ValueError` for shapes, dtypes, devices or strides other than these, `RuntimeError` if `impl` was not built.
    """
    check_required(x=x)
    check_beside(x, x=x, scale=scale, shift=shift, weight=weight, bias=bias)
    check_dimensions("x", x, "R S C")
    _, tokens, channels = x.shape
    rows = check_row_map(row_map, x, scale=scale, shift=shift)
    check_shape("scale", scale, rows, (tokens, 1), (channels,))
    check_shape("shift", shift, rows, (tokens, 1), (channels,))
    check_eps(eps)
    check_shape("weight", weight, (channels,))
    check_shape("bias", bias, (channels,))
    return run("norm_modulate", impl, x.device, x, scale, shift, weight, bias, eps, subtract_mean, row_map)
