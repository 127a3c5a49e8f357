"""LTX-Video's block: between GEMMs and attentions one op each, GEMMs called as the modules that they are.

So LoRA, quantised and offloaded weights keep working. Modulation and RoPE are the same in all branches: they are read
from one copy per video, and cos and sin once per pair instead of twice.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    LTXVideoRotaryPosEmbed,
    LTXVideoTransformerBlock,
)
from stg_kernels import norm_modulate, qk_norm_rope, residual_gate, residual_gate_norm_modulate
from torch import Tensor, nn

from stg_engine.fused.parts import attend, feed_forward, project_out
from stg_engine.hooks import is_plain, runs_own_forward
from stg_engine.layout import select
from stg_engine.rows import Run


def supports(transformer: Any, block: Any, dtype: torch.dtype) -> bool:
    """True if nothing that the fused forward bypasses or assumes was changed: classes, processors, hooks, forwards.

    Norm weights must have the latents' `dtype`: with another the modules return another dtype than the ops.
    """
    if type(block) is not LTXVideoTransformerBlock or not runs_own_forward(block):
        return False
    attentions = (block.attn1, block.attn2)
    norms = (block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q)
    weights = [weight for norm in (block.norm1, block.norm2, *norms) for weight in norm.parameters()]
    return (
        all(map(is_plain, (transformer.rope, block.norm1, block.norm2, *attentions, *norms)))
        and type(transformer.rope) is LTXVideoRotaryPosEmbed
        and all(type(norm) is RMSNorm for norm in (block.norm1, block.norm2))
        and all(type(norm) is nn.RMSNorm and norm.eps is not None for norm in norms)
        and block.attn1.norm_q.eps == block.attn1.norm_k.eps
        and all(type(attention) is LTXAttention for attention in attentions)
        and all(type(attention.processor) is LTXVideoAttnProcessor for attention in attentions)
        and block.attn1.inner_dim % (2 * block.attn1.heads) == 0
        and all(weight.dtype is dtype for weight in weights)
    )


def forward(
    run: Run,
    index: int,
    block: Any,
    *,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    encoder_attention_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """[R, S, C] -> [R, S, C] for the rows that `run` has in hand.

    hidden_states, encoder_hidden_states, encoder_attention_mask, key_lengths have R rows; temb and image_rotary_emb one
    per video. key_lengths, or the absence of padding, says what the mask says.
    """
    row_map = run.videos_of_rows(hidden_states.device)
    table = block.scale_shift_table
    modulation = table.to(temb.device) + temb.unflatten(-1, (len(table), -1))  # [B, 1 or S, 6, C]
    shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.unbind(2)
    cos, sin = run.once("pairs", image_rotary_emb, lambda: _pairs(image_rotary_emb, block.attn1.heads))

    values: list[Tensor] = []

    def self_attention(hidden_states: Tensor, row_map: Tensor | None) -> Tensor:
        attention = block.attn1
        q, k, v = (
            project(hidden_states).contiguous().unflatten(2, (attention.heads, -1))
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        values[:] = [v]
        q, k = qk_norm_rope(
            q,
            k,
            q_weight=attention.norm_q.weight,
            k_weight=attention.norm_k.weight,
            cos=cos,
            sin=sin,
            eps=attention.norm_q.eps,
            row_map=row_map,
        )
        return project_out(attention, attend(attention.processor, q, k, v))

    def cross_attention(hidden_states: Tensor) -> Tensor:
        attention = block.attn2
        q = attention.to_q(hidden_states).contiguous()
        q = norm_modulate(q, weight=attention.norm_q.weight, eps=attention.norm_q.eps)
        k = attention.norm_k(attention.to_k(encoder_hidden_states))
        v = attention.to_v(encoder_hidden_states)
        q, k, v = (x.contiguous().unflatten(2, (attention.heads, -1)) for x in (q, k, v))
        mask = encoder_attention_mask if run.is_padded else None
        if mask is not None:
            mask = attention.prepare_attention_mask(mask, k.shape[1], k.shape[0])
            mask = mask.view(k.shape[0], attention.heads, -1, mask.shape[-1])
        lengths = key_lengths if run.is_padded else None
        return project_out(attention, attend(attention.processor, q, k, v, mask, lengths))

    x = hidden_states
    normed = _norm(block.norm1, x, scale_attn, shift_attn, row_map)
    arguments = {"hidden_states": normed, "row_map": row_map}
    attended = run.self_attention(
        index,
        block.attn1,
        self_attention,
        arguments,
        carriers=tuple(arguments),
        values_again=lambda rows: project_out(block.attn1, select(values[0], rows, len(values[0]))),
    )
    x = residual_gate(x, attended, gate_attn, row_map=row_map)
    norm = block.norm2
    x, normed = residual_gate_norm_modulate(
        x,
        cross_attention(x),
        None,
        scale_ff,
        shift_ff,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        row_map=row_map,
    )
    return residual_gate(x, feed_forward(block.ff, normed), gate_ff, row_map=row_map)


def _norm(norm: RMSNorm, x: Tensor, scale: Tensor, shift: Tensor, row_map: Tensor | None) -> Tensor:
    return norm_modulate(x, scale, shift, weight=norm.weight, bias=norm.bias, eps=norm.eps, row_map=row_map)


def _pairs(image_rotary_emb: tuple[Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """[B, S, C] with every value twice -> float32 [B, S, N, D / 2]."""
    cos, sin = (table[..., ::2].unflatten(-1, (heads, -1)).float().contiguous() for table in image_rotary_emb)
    return cos, sin
