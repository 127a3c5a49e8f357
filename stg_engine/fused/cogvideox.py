"""CogVideoX's block: between GEMMs and attention one op each, GEMMs called as the modules that they are.

Modulation is the same in all branches: it is computed and read once per video. RoPE turns the video alone: over the
text cos is 1 and sin 0, so that one launch has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from stg_kernels import branch_attention, norm_modulate, qk_norm_rope, residual_gate, residual_gate_norm_modulate
from torch import Tensor, nn
from torch.nn.functional import pad

from stg_engine.fused.parts import feed_forward, project_out
from stg_engine.hooks import is_plain, runs_own_forward
from stg_engine.layout import chunk_ranges, join, narrow
from stg_engine.rows import Run


def supports(transformer: Any, block: Any, dtype: torch.dtype) -> bool:
    """True if nothing that the fused forward bypasses or assumes was changed: classes, processors, hooks, forwards.

    Norm weights must have the latents' `dtype`, as PyTorch's LayerNorm wants it.
    """
    if type(block) is not CogVideoXBlock or not runs_own_forward(block):
        return False
    zeros, attention = (block.norm1, block.norm2), block.attn1
    if not all(type(norm) is CogVideoXLayerNormZero and is_plain(norm) for norm in zeros):
        return False
    norms = (*(norm.norm for norm in zeros), attention.norm_q, attention.norm_k)
    return (
        type(attention) is Attention
        and is_plain(attention)
        and type(attention.processor) is CogVideoXAttnProcessor2_0
        and attention.inner_dim % (2 * attention.heads) == 0
        and all(type(norm) is nn.LayerNorm and is_plain(norm) for norm in norms)
        and all(weight.dtype is dtype for norm in norms for weight in norm.parameters())
        and attention.norm_q.eps == attention.norm_k.eps
    )


def forward(
    run: Run,
    index: int,
    block: Any,
    *,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Video [R, S, C] and text [R, T, C] -> the same, for the rows that `run` has in hand.

    temb has one row per video; image_rotary_emb is cos and sin [S, D] with every value twice, as a rotation of pairs
    has them, or None. The module's own forward runs if there are attention_kwargs, which may hold a mask.
    """
    row_map = run.videos_of_rows(hidden_states.device)
    if attention_kwargs:
        temb = temb if row_map is None else temb[row_map]
        return type(block).forward(
            block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs
        )
    x, text = hidden_states, encoder_hidden_states
    tokens = text.shape[1]
    rope = (None, None)
    if image_rotary_emb is not None:
        rope = run.once("rope", image_rotary_emb, lambda: _tables(image_rotary_emb, tokens, x.device))

    shift, scale, gate, text_shift, text_scale, text_gate = _modulation(run, block.norm1, temb)
    norm = _options(block.norm1.norm, row_map)
    normed = [norm_modulate(text, text_scale, text_shift, **norm), norm_modulate(x, scale, shift, **norm)]
    attended = _attention(run, index, block.attn1, torch.cat(normed, dim=1), tokens, rope)

    norm = _options(block.norm2.norm, row_map)
    shift, scale, gate_ff, text_shift, text_scale, text_gate_ff = _modulation(run, block.norm2, temb)
    x, normed_x = residual_gate_norm_modulate(x, attended[:, tokens:], gate, scale, shift, **norm)
    text, normed_text = residual_gate_norm_modulate(
        text, attended[:, :tokens], text_gate, text_scale, text_shift, **norm
    )
    out = feed_forward(block.ff, torch.cat([normed_text, normed_x], dim=1))
    x = residual_gate(x, out[:, tokens:], gate_ff, row_map=row_map)
    return x, residual_gate(text, out[:, :tokens], text_gate_ff, row_map=row_map)


def _modulation(run: Run, norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale, gate of the video, then of the text, each [B, 1, C]; of as many videos at once as rows may be."""

    def compute() -> tuple[Tensor, ...]:
        ranges = chunk_ranges(len(temb), run.max_rows)
        chunks = [norm.linear(norm.silu(narrow(temb, start, stop, len(temb)))) for start, stop in ranges]
        return join(chunks)[:, None].chunk(6, dim=-1)

    return run.once(norm, temb, compute)


def _options(norm: nn.LayerNorm, row_map: Tensor | None) -> dict[str, Any]:
    return {
        "weight": norm.weight,
        "bias": norm.bias,
        "eps": norm.eps,
        "subtract_mean": True,
        "row_map": row_map,
    }


def _tables(image_rotary_emb: tuple[Tensor, Tensor], tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[S, D] with every value twice -> float32 [1, T + S, 1, D / 2]; the text is not turned."""
    cos, sin = (table[:, ::2].to(device, torch.float32) for table in image_rotary_emb)
    return pad(cos, (0, 0, tokens, 0), value=1.0)[None, :, None], pad(sin, (0, 0, tokens, 0))[None, :, None]


def _attention(
    run: Run, index: int, attention: Any, joint: Tensor, tokens: int, rope: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """Attention over [text; video], [R, T + S, C] -> the same; rows that skip it have their own keys."""
    q, k, v = (
        project(joint).contiguous().unflatten(2, (attention.heads, -1))
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    cos, sin = rope
    q, k = qk_norm_rope(
        q,
        k,
        q_weight=attention.norm_q.weight,
        k_weight=attention.norm_k.weight,
        q_bias=attention.norm_q.bias,
        k_bias=attention.norm_k.bias,
        cos=cos,
        sin=sin,
        eps=attention.norm_q.eps,
        per_head=True,
        subtract_mean=True,
    )
    skipping = run.skipping_attention(index)
    out = branch_attention(q, k, v, own_key_rows=skipping, text=(0, tokens) if skipping else None)
    return project_out(attention, out)
