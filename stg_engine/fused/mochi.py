"""Mochi's block: between GEMMs and attention one op each, GEMMs called as the modules that they are.

One call attends for all rows, by the lengths of their prompts; diffusers makes one per row, of the tokens that its mask
keeps, for which it waits.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from diffusers.models.normalization import MochiRMSNorm, RMSNorm
from diffusers.models.transformers.transformer_mochi import (
    MochiLayerNormContinuous,
    MochiModulatedRMSNorm,
    MochiRMSNormZero,
    MochiTransformerBlock,
)
from stg_kernels import branch_attention, norm_modulate, qk_norm_rope, residual_gate, residual_gate_norm_modulate
from torch import Tensor, nn

from stg_engine.hooks import is_plain, runs_own_forward
from stg_engine.rows import Run

INNER = {
    MochiLayerNormContinuous: MochiModulatedRMSNorm,
    MochiRMSNormZero: RMSNorm,
    MochiModulatedRMSNorm: RMSNorm,
}
"""Class of a norm -> that of its `norm`."""


def supports(transformer: Any, block: Any, dtype: torch.dtype) -> bool:
    """True if nothing that the fused forward bypasses or assumes was changed: classes, processors, hooks, forwards.

    The weights of the query and key norms must be of the latents' `dtype` or float32.
    """
    if type(block) is not MochiTransformerBlock or not runs_own_forward(block):
        return False
    text_norms: dict[str, type[nn.Module]] = {"norm1_context": MochiLayerNormContinuous}
    if not block.context_pre_only:
        modulated = dict.fromkeys(("norm2_context", "norm3_context", "norm4_context"), MochiModulatedRMSNorm)
        text_norms = {"norm1_context": MochiRMSNormZero, **modulated}
    norms = {"norm1": MochiRMSNormZero, **dict.fromkeys(("norm2", "norm3", "norm4"), MochiModulatedRMSNorm)}
    attention = block.attn1
    return (
        all(_is_unchanged(getattr(block, name), kind) for name, kind in (norms | text_norms).items())
        and type(attention) is MochiAttention
        and is_plain(attention)
        and type(attention.processor) is MochiAttnProcessor2_0
        and attention.inner_dim % (2 * attention.heads) == 0
        and _is_pair(attention.norm_q, attention.norm_k, dtype)
        and _is_pair(attention.norm_added_q, attention.norm_added_k, dtype)
    )


def _is_unchanged(norm: Any, kind: type[nn.Module]) -> bool:
    if type(norm) is not kind or not is_plain(norm):
        return False
    return _is_unchanged(norm.norm, INNER[kind]) if kind in INNER else norm.weight is None and norm.bias is None


def _is_pair(q_norm: Any, k_norm: Any, dtype: torch.dtype) -> bool:
    return (
        all(type(norm) is MochiRMSNorm and is_plain(norm) for norm in (q_norm, k_norm))
        and all(norm.weight is not None and norm.weight.dtype in (dtype, torch.float32) for norm in (q_norm, k_norm))
        and q_norm.eps == k_norm.eps
    )


def forward(
    run: Run,
    index: int,
    block: Any,
    *,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Video [R, S, C] and text [R, T, C'] -> the same, for the rows that `run` has in hand; all but RoPE has R rows.

    The module's own forward runs where the mask is more than padding behind the prompt: key_lengths cannot say it.
    """
    if run.is_padded and key_lengths is None:
        return type(block).forward(
            block, hidden_states, encoder_hidden_states, temb, encoder_attention_mask, image_rotary_emb
        )
    x, text = hidden_states.contiguous(), encoder_hidden_states.contiguous()
    normed, gates = _first_norm(block.norm1, x, temb)
    if block.context_pre_only:
        norm = block.norm1_context
        scale = norm.linear_1(norm.silu(temb).to(text.dtype))[:, None]
        normed_text = norm_modulate(text, scale, eps=norm.norm.norm.eps)
    else:
        normed_text, text_gates = _first_norm(block.norm1_context, text, temb)

    lengths = key_lengths if run.is_padded else None
    rope = run.once("rope", image_rotary_emb, lambda: _tables(image_rotary_emb))
    attention, size = block.attn1, x.shape[1]
    out = _joint_attention(run, index, attention, normed, normed_text, rope, lengths)
    projection, dropout = attention.to_out
    attended = dropout(projection(out[:, :size]))
    x = _gated(x, attended, gates, block.norm2, block.norm3, block.ff, block.norm4)
    if not block.context_pre_only:
        attended = out[:, size:]
        if lengths is not None:
            attended = torch.where(encoder_attention_mask.bool()[..., None], attended, 0)
        norms_and_ff = block.norm2_context, block.norm3_context, block.ff_context, block.norm4_context
        text = _gated(text, attention.to_add_out(attended), text_gates, *norms_and_ff)
    return x, text


def _first_norm(norm: Any, x: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
    """RMS(x) (1 + scale), and gate, scale of the feed-forward, gate of the feed-forward, each [R, 1, C]."""
    scale, *gates = norm.linear(norm.silu(temb))[:, None].chunk(4, dim=-1)
    return norm_modulate(x, scale, eps=norm.norm.eps), gates


def _tables(image_rotary_emb: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[S, N, D / 2] -> float32 [1, S, N, D / 2]."""
    cos, sin = (table[None].float().contiguous() for table in image_rotary_emb)
    return cos, sin


def _joint_attention(
    run: Run,
    index: int,
    attention: Any,
    x: Tensor,
    text: Tensor,
    rope: tuple[Tensor, Tensor],
    key_lengths: Tensor | None,
) -> Tensor:
    """Attention over [video; text] before the projections, [R, S + T, C]; rows that skip it have their own keys."""
    video_q, video_k, video_v = _heads(attention.heads, x, attention.to_q, attention.to_k, attention.to_v)
    text_q, text_k, text_v = _heads(
        attention.heads, text, attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
    )
    cos, sin = rope
    video_q, video_k = _qk_norm_rope(video_q, video_k, attention.norm_q, attention.norm_k, cos=cos, sin=sin)
    text_q, text_k = _qk_norm_rope(text_q, text_k, attention.norm_added_q, attention.norm_added_k)
    q, k, v = (torch.cat(parts, dim=1) for parts in ((video_q, text_q), (video_k, text_k), (video_v, text_v)))
    size, skipping = x.shape[1], run.skipping_attention(index)
    return branch_attention(
        q,
        k,
        v,
        key_lengths=None if key_lengths is None else size + key_lengths,
        own_key_rows=skipping,
        text=(size, q.shape[1]) if skipping else None,
    ).flatten(2)


def _heads(heads: int, x: Tensor, *projections: nn.Module) -> list[Tensor]:
    return [projection(x).contiguous().unflatten(2, (heads, -1)) for projection in projections]


def _qk_norm_rope(q: Tensor, k: Tensor, q_norm: Any, k_norm: Any, **tables: Tensor) -> tuple[Tensor, Tensor]:
    weights = {"q_weight": q_norm.weight, "k_weight": k_norm.weight}
    return qk_norm_rope(q, k, **weights, **tables, eps=q_norm.eps, per_head=True)


def _gated(x: Tensor, attended: Tensor, gates: list[Tensor], norm2: Any, norm3: Any, ff: Any, norm4: Any) -> Tensor:
    """h = x + RMS(attended) tanh(gate_attn), then h + RMS(ff(RMS(h) (1 + scale_ff))) tanh(gate_ff)."""
    gate_attn, scale_ff, gate_ff = gates
    attended = norm_modulate(attended, eps=norm2.norm.eps)
    x, normed = residual_gate_norm_modulate(x, attended, gate_attn.tanh(), scale_ff, eps=norm3.norm.eps)
    return residual_gate(x, norm_modulate(ff(normed), eps=norm4.norm.eps), gate_ff.tanh())
