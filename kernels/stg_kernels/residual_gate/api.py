"""Gated residual, alone and with the normalization that follows it."""

from __future__ import annotations

import torch
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


def residual_gate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    row_map: Tensor | None = None,
    pass_through: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """`x + gate * y`; rows that pass through are x, bit for bit.

    x, y          [R, S, C] float32, bfloat16, float16; last dimension contiguous, any other strides; one dtype
    gate          [R or 1, S or 1, C], x's dtype or float32; None is 1
    row_map       int64 [R]: row r takes its gate from row row_map[r], values checked on the CPU alone
    pass_through  bool [R]
    impl          None: the best one for the device; "reference", "fused" (Triton), "native" (C++/CUDA)

    Returns [R, S, C] in x's dtype, contiguous. float32 arithmetic, one rounding at the end; deterministic.
    Raises `ValueError` for shapes, dtypes, devices or strides other than these, `RuntimeError` if `impl` was not built.
    """
    _check(x, y, gate, pass_through)
    check_shape("gate", gate, check_row_map(row_map, x, gate=gate), (x.shape[1], 1), x.shape[2:])
    return run("residual_gate", impl, x.device, x, y, gate, row_map, pass_through)


def residual_gate_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    subtract_mean: bool = False,
    row_map: Tensor | None = None,
    pass_through: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`h = residual_gate(x, y, gate)` and `norm_modulate(h, scale, shift)` of the rounded h: two reads, two writes.

    Arguments, precision and errors as in `residual_gate` and `norm_modulate`; gate, scale and shift share `row_map`.
    Returns (h, norm), each [R, S, C] in x's dtype, contiguous.
    """
    _check(x, y, gate, pass_through)
    check_beside(x, scale=scale, shift=shift, weight=weight, bias=bias)
    _, tokens, channels = x.shape
    rows = check_row_map(row_map, x, gate=gate, scale=scale, shift=shift)
    for name, tensor in (("gate", gate), ("scale", scale), ("shift", shift)):
        check_shape(name, tensor, rows, (tokens, 1), (channels,))
    check_eps(eps)
    check_shape("weight", weight, (channels,))
    check_shape("bias", bias, (channels,))
    arguments = (x, y, gate, scale, shift, weight, bias, eps, subtract_mean, row_map, pass_through)
    return run("residual_gate_norm_modulate", impl, x.device, *arguments)


def _check(x: Tensor, y: Tensor, gate: Tensor | None, pass_through: Tensor | None) -> None:
    check_required(x=x, y=y)
    check_beside(x, x=x, y=y, gate=gate)
    check_dimensions("x", x, "R S C")
    check_shape("y", y, *((size,) for size in x.shape))
    if y.dtype != x.dtype:
        raise ValueError(f"y has dtype {y.dtype}; it must have {x.dtype}, as x")
    if pass_through is not None and not isinstance(pass_through, Tensor):
        raise TypeError(f"pass_through={pass_through!r} is not allowed; it must be a tensor")
    if pass_through is not None and (
        pass_through.dtype != torch.bool or pass_through.shape != x.shape[:1] or pass_through.device != x.device
    ):
        raise ValueError(
            f"pass_through is {pass_through.dtype} {tuple(pass_through.shape)} on {pass_through.device}; "
            f"it must be bool [{x.shape[0]}] on {x.device}"
        )
