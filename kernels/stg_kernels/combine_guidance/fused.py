"""Triton: one launch, and one before it where a standard deviation or CFG-star needs sums over a video."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stg_kernels._triton import check_device, pointer

BLOCK = 1024
WARPS = 4
CHUNKS = 256  # partial sums per video, merged by one program in registers
# Mean and M2 of guided, of cond; CFG-star: mean and M2 of uncond, centred <guided, u>, <c, u>, alpha
MOMENTS = 9
RUNTIME_SIZES = ["elements", "chunk", "chunks", "videos", "skips"]


@triton.jit
def _guided(
    rows_ptr,
    scales_ptr,
    alpha,
    video,
    position,
    mask,
    elements,
    videos,
    skips,
    HAS_UNCOND: tl.constexpr,
    CFG_STAR: tl.constexpr,
):
    """`a u + g (c - a u) + sum_i s_i (c - p_i)`, a being alpha; cond and uncond; float32.

    a u alone would be rounded, and the error multiplied by g - 1: `n + g (c - n) + beta u`, n being u or 0.
    """
    branch = videos.to(tl.int64) * elements
    at = rows_ptr + video * elements + position
    cond = tl.load(at + HAS_UNCOND * branch, mask, other=0.0).to(tl.float32)
    uncond = tl.zeros_like(cond)
    guided = cond
    if HAS_UNCOND:
        g = tl.load(scales_ptr)
        uncond = tl.load(at, mask, other=0.0).to(tl.float32)
        if CFG_STAR:
            near = tl.where(alpha > 0.5, 1.0, 0.0)
            guided = near * uncond
            guided += g * (cond - guided)
            guided += (alpha - near) * (1.0 - g) * uncond
        else:
            guided = uncond + g * (cond - uncond)
    for i in range(skips):
        skip = tl.load(at + (1 + HAS_UNCOND + i) * branch, mask, other=0.0).to(tl.float32)
        guided += tl.load(scales_ptr + 2 + i) * (cond - skip)
    return guided, cond, uncond


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _moments_kernel(
    rows_ptr,
    scales_ptr,
    moments_ptr,
    elements,
    chunk,
    chunks,
    videos,
    skips,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    CFG_STAR: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Moments of one chunk of one video, merged block by block (Chan, Golub, LeVeque 1983).

    CFG-star's alpha is known when all of the video has been read. Until then guided has that of the chunk, with which
    alpha u is no larger than c: nothing cancels.
    """
    video = tl.program_id(1).to(tl.int64)
    elements = elements // VEC * VEC  # the same number, known to be a multiple
    start = tl.program_id(0).to(tl.int64) * (chunk // BLOCK * BLOCK)
    stop = tl.minimum(start + chunk, elements) // VEC * VEC
    count = 0.0
    mean_g = 0.0
    mean_c = 0.0
    mean_u = 0.0
    m2_g = 0.0
    m2_c = 0.0
    cov_gu = 0.0
    dot_cu = 0.0
    m2_u = 0.0
    alpha = 1.0
    if CFG_STAR:
        dot_uu = 0.0
        at = rows_ptr + video * elements
        for begin in range(start, stop, BLOCK):
            position = begin + tl.arange(0, BLOCK)
            mask = position < stop
            u = tl.load(at + position, mask, other=0.0).to(tl.float32)
            c = tl.load(at + videos.to(tl.int64) * elements + position, mask, other=0.0).to(tl.float32)
            dot_cu += tl.sum(c * u, axis=0)
            dot_uu += tl.sum(u * u, axis=0)
        alpha = dot_cu / (dot_uu + 1e-8)
    for begin in range(start, stop, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        mask = position < stop
        g, c, u = _guided(
            rows_ptr, scales_ptr, alpha, video, position, mask, elements, videos, skips, HAS_UNCOND, CFG_STAR
        )
        n = tl.minimum(stop - begin, BLOCK).to(tl.float32)
        weight = n / (count + n)
        block_g = tl.sum(g, axis=0) / n
        block_c = tl.sum(c, axis=0) / n
        g = tl.where(mask, g - block_g, 0.0)
        d = tl.where(mask, c - block_c, 0.0)
        delta_g = block_g - mean_g
        delta_c = block_c - mean_c
        m2_g += tl.sum(g * g, axis=0) + delta_g * delta_g * count * weight
        m2_c += tl.sum(d * d, axis=0) + delta_c * delta_c * count * weight
        if CFG_STAR:
            block_u = tl.sum(u, axis=0) / n
            delta_u = block_u - mean_u
            u = tl.where(mask, u - block_u, 0.0)
            cov_gu += tl.sum(g * u, axis=0) + delta_g * delta_u * count * weight
            m2_u += tl.sum(u * u, axis=0) + delta_u * delta_u * count * weight
            mean_u += delta_u * weight
        mean_g += delta_g * weight
        mean_c += delta_c * weight
        count += n
    out = moments_ptr + (video * chunks + tl.program_id(0)) * MOMENTS
    tl.store(out + 0, mean_g)
    tl.store(out + 1, m2_g)
    tl.store(out + 2, mean_c)
    tl.store(out + 3, m2_c)
    if CFG_STAR:
        tl.store(out + 4, mean_u)
        tl.store(out + 5, cov_gu)
        tl.store(out + 6, dot_cu)
        tl.store(out + 7, m2_u)
        tl.store(out + 8, alpha)


@triton.jit
def _video_moments(
    scales_ptr,
    moments_ptr,
    video,
    elements,
    chunk,
    chunks,
    CHUNKS: tl.constexpr,
    CFG_STAR: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Over one video: mean and M2 of guided, of cond, and CFG-star's alpha."""
    i = tl.arange(0, CHUNKS)
    inside = i < chunks
    at = moments_ptr + (video * chunks + i) * MOMENTS
    n = tl.where(inside, tl.minimum(chunk, elements - i.to(tl.int64) * chunk), 0).to(tl.float32)
    total = tl.sum(n, axis=0)
    means_c = tl.load(at + 2, inside, other=0.0)
    mean_c = tl.sum(n * means_c, axis=0) / total
    from_c = means_c - mean_c
    m2_c = tl.sum(tl.load(at + 3, inside, other=0.0) + n * from_c * from_c, axis=0)
    means_g = tl.load(at + 0, inside, other=0.0)
    m2s_g = tl.load(at + 1, inside, other=0.0)
    alpha = 1.0
    if CFG_STAR:
        means_u = tl.load(at + 4, inside, other=0.0)
        covs = tl.load(at + 5, inside, other=0.0)
        m2s_u = tl.load(at + 7, inside, other=0.0)
        dot_uu = tl.sum(m2s_u + n * means_u * means_u, axis=0)
        alpha = tl.sum(tl.load(at + 6, inside, other=0.0), axis=0) / (dot_uu + 1e-8)
        b = (1.0 - tl.load(scales_ptr)) * (alpha - tl.load(at + 8, inside, other=0.0))
        means_g += b * means_u
        m2s_g = tl.maximum(m2s_g + 2.0 * b * covs + b * b * m2s_u, 0.0)
    mean_g = tl.sum(n * means_g, axis=0) / total
    from_g = means_g - mean_g
    m2_g = tl.sum(m2s_g + n * from_g * from_g, axis=0)
    return total, mean_g, m2_g, mean_c, m2_c, alpha


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _combine_guidance_kernel(
    rows_ptr,
    scales_ptr,
    moments_ptr,
    latents_ptr,
    dt_ptr,
    out_ptr,
    elements,
    chunk,
    chunks,
    videos,
    skips,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    VEC: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    RESCALE: tl.constexpr,
    OVER_BATCH: tl.constexpr,
    CFG_STAR: tl.constexpr,
    EULER: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    video = tl.program_id(1).to(tl.int64)
    elements = elements // VEC * VEC  # the same number, known to be a multiple
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = position < elements
    alpha = 1.0
    if not CFG_STAR:  # which has to know alpha; elsewhere reading early leaves sm_100 enough registers
        guided, _, _ = _guided(
            rows_ptr, scales_ptr, alpha, video, position, mask, elements, videos, skips, HAS_UNCOND, CFG_STAR
        )
    if RESCALE or CFG_STAR:
        _n, _g, m2_g, _c, m2_c, alpha = _video_moments(
            scales_ptr, moments_ptr, video, elements, chunk, chunks, CHUNKS, CFG_STAR, MOMENTS
        )
    if RESCALE:
        if OVER_BATCH:
            count = 0.0
            mean_g = 0.0
            mean_c = 0.0
            m2_g = 0.0
            m2_c = 0.0
            for other in range(videos):
                n, video_g, video_m2_g, video_c, video_m2_c, _a = _video_moments(
                    scales_ptr, moments_ptr, other, elements, chunk, chunks, CHUNKS, CFG_STAR, MOMENTS
                )
                weight = n / (count + n)
                delta_g = video_g - mean_g
                delta_c = video_c - mean_c
                m2_g += video_m2_g + delta_g * delta_g * count * weight
                m2_c += video_m2_c + delta_c * delta_c * count * weight
                mean_g += delta_g * weight
                mean_c += delta_c * weight
                count += n
        r = tl.load(scales_ptr + 1)
        factor = r * tl.sqrt(m2_c / m2_g) + (1.0 - r)
    if CFG_STAR:
        guided, _, _ = _guided(
            rows_ptr, scales_ptr, alpha, video, position, mask, elements, videos, skips, HAS_UNCOND, CFG_STAR
        )
    if RESCALE:
        guided *= factor
    at = video * elements + position
    if EULER:
        guided = tl.load(latents_ptr + at, mask, other=0.0).to(tl.float32) + tl.load(dt_ptr) * guided
    tl.store(out_ptr + at, guided.to(out_ptr.dtype.element_ty), mask)


def combine_guidance(
    rows: Tensor,
    scales: Tensor,
    has_uncond: bool,
    rescale: bool = False,
    over_batch: bool = False,
    cfg_star: bool = False,
    dtype: torch.dtype | None = None,
    latents: Tensor | None = None,
    dt: Tensor | None = None,
) -> Tensor:
    """See `stg_kernels.combine_guidance`."""
    check_device(rows)
    skips = scales.numel() - 2
    videos = rows.shape[0] // (1 + has_uncond + skips)
    out_dtype = (dtype or rows.dtype) if latents is None else latents.dtype
    out = rows.new_empty((videos, *rows.shape[1:]), dtype=out_dtype)
    if out.numel() == 0:
        return out
    elements = out[0].numel()
    # The split depends on one video's size alone, so that a result does not depend on what else is in the batch.
    chunk = triton.cdiv(triton.cdiv(elements, CHUNKS), BLOCK) * BLOCK
    chunks = triton.cdiv(elements, chunk)
    vec = 1 if elements % 8 else 8
    sizes = (elements, chunk, chunks, videos, skips)
    needs_moments = rescale or cfg_star
    moments = rows.new_empty((videos * chunks * MOMENTS) if needs_moments else 1, dtype=torch.float32)
    scales = pointer(scales, rows)
    with torch.cuda.device_of(rows):
        if needs_moments:
            _moments_kernel[(chunks, videos)](
                rows, scales, moments, *sizes,
                BLOCK=BLOCK, VEC=vec, HAS_UNCOND=has_uncond, CFG_STAR=cfg_star, MOMENTS=MOMENTS, num_warps=WARPS,
            )  # fmt: skip
        _combine_guidance_kernel[(triton.cdiv(elements, BLOCK), videos)](
            rows,
            scales,
            moments,
            pointer(latents, rows),
            pointer(dt, rows),
            out,
            *sizes,
            BLOCK=BLOCK,
            CHUNKS=CHUNKS,
            VEC=vec,
            HAS_UNCOND=has_uncond,
            RESCALE=rescale,
            OVER_BATCH=over_batch,
            CFG_STAR=cfg_star,
            EULER=latents is not None,
            MOMENTS=MOMENTS,
            num_warps=WARPS,
        )
    return out
