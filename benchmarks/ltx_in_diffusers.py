"""What diffusers' LTX-Video runs where stg_kernels has an op: the baseline of who replaces it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from diffusers.pipelines.ltx.pipeline_ltx import rescale_noise_cfg
from torch import Tensor, nn

EPS = 1e-6  # the ops' default


def expression(op: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    """A call that computes `op` of `arguments` by the modules, functions and expressions of diffusers' LTX-Video.

    Layouts are those of diffusers: cos and sin per row and channel, guidance scales as Python numbers. The pipeline has
    no skip term; it is written as the pipeline writes classifier-free guidance, in float32.
    """
    return {
        "norm_modulate": _norm_modulate,
        "residual_gate": _residual_gate,
        "residual_gate_norm_modulate": _residual_gate_norm_modulate,
        "qk_norm_rope": _qk_norm_rope,
        "combine_guidance": _combine_guidance,
    }[op](SimpleNamespace(**arguments))


def _norm_modulate(of: Any) -> Callable[[], Tensor]:
    norm = RMSNorm(of.x.shape[-1], eps=EPS, elementwise_affine=False)
    return lambda: norm(of.x) * (1 + of.scale) + of.shift


def _residual_gate(of: Any) -> Callable[[], Tensor]:
    return lambda: of.x + of.y * of.gate


def _residual_gate_norm_modulate(of: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    norm = RMSNorm(of.x.shape[-1], eps=EPS, elementwise_affine=False)

    def call() -> tuple[Tensor, Tensor]:
        hidden_states = of.x + of.y * of.gate
        return hidden_states, norm(hidden_states) * (1 + of.scale) + of.shift

    return call


def _qk_norm_rope(of: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    norm_q, norm_k = nn.RMSNorm(len(of.q_weight), eps=EPS), nn.RMSNorm(len(of.k_weight), eps=EPS)
    norm_q.weight, norm_k.weight = nn.Parameter(of.q_weight), nn.Parameter(of.k_weight)
    query, key, (rows, _, heads, _) = of.q.flatten(2), of.k.flatten(2), of.q.shape
    rope = tuple(table.flatten(2).repeat_interleave(2, dim=-1).repeat(rows, 1, 1) for table in (of.cos, of.sin))

    def call() -> tuple[Tensor, Tensor]:
        q, k = apply_rotary_emb(norm_q(query), rope), apply_rotary_emb(norm_k(key), rope)
        return q.unflatten(2, (heads, -1)), k.unflatten(2, (heads, -1))

    return call


def _combine_guidance(of: Any) -> Callable[[], Tensor]:
    guidance_scale, rescale, *skip_scales = of.scales.tolist()

    def call() -> Tensor:
        uncond, cond, *skips = of.rows.float().chunk(2 + len(skip_scales))
        guided = uncond + guidance_scale * (cond - uncond)
        for scale, skip in zip(skip_scales, skips, strict=True):
            guided = guided + scale * (cond - skip)
        return rescale_noise_cfg(guided, cond, rescale)

    return call
