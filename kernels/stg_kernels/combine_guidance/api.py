"""Rows of a guided forward -> the guided prediction, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from stg_kernels.choose import DTYPES, check_floating, check_required, run


def combine_guidance(
    rows: Tensor,
    scales: Tensor,
    *,
    has_uncond: bool,
    rescale: bool = False,
    over_batch: bool = False,
    cfg_star: bool = False,
    dtype: torch.dtype | None = None,
    latents: Tensor | None = None,
    dt: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """`v = u + g (c - u) + sum_i s_i (c - p_i)`, rescaled; with latents the Euler step `x + dt v`.

    Without uncond `v = c + sum_i s_i (c - p_i)`. `rescale`: v times `r std(c) / std(v) + 1 - r` (arXiv 2411.18664
    Alg. 4), N - 1, over each video, or over all if `over_batch`. `cfg_star`: u is first multiplied by
    `<c, u> / (|u|^2 + 1e-8)` of its video (Lightricks/LTX-Video).

    rows     [K * B, ...] float32, bfloat16, float16, contiguous: branches uncond (if any), cond, skip, skip2, ...
    scales   float32 [2 + number of skips] on the rows' device: g, r, s_1, s_2, ...; read when the kernel runs, so that
             a captured CUDA graph follows their values
    dtype    of the result; None: the rows'. With latents: theirs
    latents  [B, ...] x, contiguous; dt: float32 [1], sigma of the next step minus sigma of this one
    impl     None: the best one for the device; "reference", "fused" (Triton), "native" (C++/CUDA)

    rescale and cfg_star sum squares in float32: a video's values are to be between about 1e-18 and 1e16 in size, or
    the factor of v or u is 0, infinite or NaN.

    Returns [B, ...]. float32 arithmetic on differences, one rounding at the end; sums over fixed tiles in fixed order,
    so deterministic; one launch, two with rescale or cfg_star; never waits for the device. Raises `ValueError` for
    shapes, dtypes or devices other than these, `RuntimeError` if `impl` was not built.
    """
    check_required(rows=rows, scales=scales)
    check_floating(rows=rows, scales=scales, latents=latents, dt=dt)
    if scales.ndim != 1 or scales.numel() < 2 or scales.dtype != torch.float32 or scales.device != rows.device:
        raise ValueError(
            f"scales is {scales.dtype} {tuple(scales.shape)} on {scales.device}; it must be float32 "
            f"[2 + number of skips] on {rows.device}"
        )
    branches = scales.numel() - 1 + has_uncond
    if rows.ndim < 2 or rows.shape[0] % branches or not rows.is_contiguous():
        raise ValueError(
            f"rows has shape {tuple(rows.shape)} and strides {rows.stride()}; it must be contiguous [K * B, ...] "
            f"with K = {branches}"
        )
    if cfg_star and not has_uncond:
        raise ValueError("cfg_star=True needs uncond rows; has_uncond is False")
    if (latents is None) != (dt is None):
        raise ValueError("latents and dt go together; pass both or neither")
    if latents is not None and dt is not None:
        shape = (rows.shape[0] // branches, *rows.shape[1:])
        if latents.shape != shape or not latents.is_contiguous() or latents.device != rows.device:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)} on {latents.device}; it must be contiguous {shape} "
                f"on {rows.device}"
            )
        if dt.shape != (1,) or dt.dtype != torch.float32 or dt.device != rows.device:
            raise ValueError(f"dt is {dt.dtype} {tuple(dt.shape)} on {dt.device}; it must be float32 [1]")
        if dtype not in (None, latents.dtype):
            raise ValueError(f"dtype={dtype} is not allowed with latents, whose dtype the result has")
    allowed = (torch.float64,) if rows.dtype == torch.float64 else DTYPES
    for name, value in (("dtype", dtype), ("latents.dtype", None if latents is None else latents.dtype)):
        if value not in (None, *allowed):
            names = ", ".join(map(str, allowed))
            raise ValueError(f"{name}={value} is not allowed with rows of {rows.dtype}; it must be one of {names}")
    arguments = (rows, scales, has_uncond, rescale, over_batch, cfg_star, dtype, latents, dt)
    return run("combine_guidance", impl, rows.device, *arguments)
