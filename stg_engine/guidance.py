"""How predictions combine. Pure functions on tensors; every reduction is per video unless said otherwise.

Shapes: each prediction [B, ...], one entry per video, in the model's own output space (velocity for flow models).
Equation numbers: Hyung et al., Spatiotemporal Skip Guidance, arXiv 2411.18664.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(
    cond: Tensor,
    uncond: Tensor | None,
    skips: Sequence[tuple[Tensor, float]],
    *,
    guidance_scale: float | Tensor = 1.0,
    modality: Tensor | None = None,
    modality_scale: float = 1.0,
    weak_pass: str = "prompt",
    rescale: float = 0.0,
    cfg_star: bool = False,
    rescale_over: str = "sample",
    arithmetic: str = "float32",
    latents: Tensor | None = None,
    sigma: float | Tensor | None = None,
) -> Tensor:
    """`q + sum_i s_i (c - p_i) + (mu - 1)(c - m)` with `q = u + g (c - u)`, or c without uncond; then the std-rescale.

    guidance_scale  g, or a tensor that broadcasts to a prediction (Stable Video Diffusion: [B, F, 1, 1, 1])
    modality        m, the pass with isolated modalities (LTX-2), and its scale mu
    weak_pass       of `STGConfig`: "negative_prompt" takes `q - p_i`; "uncond" has no skips, u is the weak pass
    latents, sigma  x and its noise level, a number or per token [B, S]: all of this in `x0 = x - sigma v`, and back

    The paper gives CFG (Eq. 6) and the skip term (Eq. 13) on their own; their sum is the published codes' convention.
    Returns float32 [B, ...], float64 for float64; rounded to the predictions' dtype between operations only if
    arithmetic is "model".
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    if arithmetic == "float32":
        cond = cond.to(wide)
        uncond = None if uncond is None else uncond.to(wide)
        modality = None if modality is None else modality.to(wide)
        skips = [(skip.to(wide), scale) for skip, scale in skips]
    if latents is not None and sigma is not None:
        x = latents.to(wide)
        level = per_token(sigma, x)
        clean = combine(
            x - level * cond,
            None if uncond is None else x - level * uncond,
            [(x - level * skip, scale) for skip, scale in skips],
            guidance_scale=guidance_scale,
            modality=None if modality is None else x - level * modality,
            modality_scale=modality_scale,
            weak_pass=weak_pass,
            rescale=rescale,
            cfg_star=cfg_star,
            rescale_over=rescale_over,
        )
        return velocity(x, clean, level)
    if isinstance(guidance_scale, Tensor):
        guidance_scale = guidance_scale.to(cond)
    guided = cond
    if uncond is not None:
        if cfg_star:
            uncond = cfg_star_alpha(cond.to(wide), uncond.to(wide)).to(uncond.dtype) * uncond  # |u|^2 overflows fp16
        guided = uncond + guidance_scale * (cond - uncond)
    base = guided if weak_pass == "negative_prompt" else cond
    for skip, scale in skips:
        guided = guided + scale * (base - skip)
    if modality is not None:
        guided = guided + (modality_scale - 1.0) * (cond - modality)
    if rescale > 0 and guided is not cond:
        guided = guided * rescale_factor(cond, guided, rescale, over=rescale_over)
    return guided.to(wide)


def skip_term(cond: Tensor, skips: Sequence[tuple[Tensor, float]]) -> Tensor:
    """`sum_i s_i (c - p_i)` (Eq. 13), in the predictions' shape and dtype."""
    term = torch.zeros_like(cond)
    for skip, scale in skips:
        term = term + scale * (cond - skip)
    return term


def per_token(sigma: float | Tensor, latents: Tensor) -> Tensor:
    """sigma, a number or [B, S], as a tensor that broadcasts to latents [B, S, ...]. ValueError if it does not."""
    if not isinstance(sigma, Tensor):
        return latents.new_full((), sigma)
    if sigma.shape != latents.shape[: sigma.ndim]:
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)}; it must be a number or begin as the latents, {tuple(latents.shape)}"
        )
    return sigma.to(latents)[(...,) + (None,) * (latents.ndim - sigma.ndim)]


def velocity(latents: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
    """`(x - x0) / sigma`; 0 where sigma is 0, at tokens that are given and do not move."""
    return torch.where(sigma > 0, (latents - clean) / sigma, 0.0)


def zero_init(latents: Tensor, sigma: float | Tensor) -> Tensor:
    """The velocity of x0 = 0, `x / sigma`, in the latents' dtype."""
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    return velocity(x, torch.zeros_like(x), per_token(sigma, x)).to(latents.dtype)


def scale_for_cond(guidance_scale: float, skip_scales: Sequence[float]) -> float:
    """g' with `q + s (q - p) = u + g' (c - u) + s (c - p)`, `q = u + g (c - u)`: `g + s (g - 1)`, s summed."""
    return guidance_scale + sum(skip_scales) * (guidance_scale - 1.0)


def rescale_factor(cond: Tensor, guided: Tensor, rescale: float, *, over: str = "sample") -> Tensor:
    """`r std(c) / std(guided) + 1 - r` (Alg. 4), unbiased std over all but dim 0, or over everything if over="batch".

    Returns [B, 1, ...] or, over="batch", a scalar tensor.
    """
    dims = tuple(range(1, cond.ndim)) if over == "sample" else tuple(range(cond.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return rescale * ratio + (1.0 - rescale)


def cfg_star_alpha(cond: Tensor, uncond: Tensor) -> Tensor:
    """`<c, u> / (|u|^2 + 1e-8)` per video, [B, 1, ...] (CFG-star, Lightricks/LTX-Video `cfg_star_rescale`)."""
    dims = tuple(range(1, cond.ndim))
    return (cond * uncond).sum(dims, keepdim=True) / (uncond.square().sum(dims, keepdim=True) + 1e-8)


def largest_difference(cond: Tensor, skip: Tensor) -> Tensor:
    """`max |c - p|`, a scalar on the predictions' device; 0 means that the skip changed nothing."""
    return torch.linalg.vector_norm((cond - skip).float(), ord=torch.inf)
