"""Wan's and SkyReels-V2's block: between GEMMs and attentions one op each, GEMMs called as the modules that they are.

Norms, modulation and gates are float32 and rounded once, as in the modules; q and k are rounded once behind norm and
RoPE, where the modules round behind each. The modulation is read from one copy per video.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers import transformer_skyreels_v2 as skyreels
from diffusers.models.transformers import transformer_wan as wan
from stg_kernels import norm_modulate, qk_norm_rope, residual_gate, residual_gate_norm_modulate
from torch import Tensor, nn

from stg_engine.fused.parts import attend, feed_forward, project_out
from stg_engine.hooks import is_plain, runs_own_forward
from stg_engine.layout import select
from stg_engine.rows import Run

TEXT = 512
"""Tokens of the text in `encoder_hidden_states`, behind those of the image: the number in diffusers' processors."""

CLASSES: dict[type, tuple[type, type, type]] = {
    wan.WanTransformerBlock: (wan.WanAttention, wan.WanAttnProcessor, wan.WanRotaryPosEmbed),
    skyreels.SkyReelsV2TransformerBlock: (
        skyreels.SkyReelsV2Attention,
        skyreels.SkyReelsV2AttnProcessor,
        skyreels.SkyReelsV2RotaryPosEmbed,
    ),
}
"""Class of the block -> those of its attentions, their processors, and the transformer's RoPE."""


def supports(transformer: Any, block: Any, dtype: torch.dtype) -> bool:
    """True if nothing that the fused forward bypasses or assumes was changed: classes, processors, hooks, forwards.

    Weights of LayerNorms may have the latents' `dtype` or be in float32, where loading leaves them; those of the norms
    of queries and keys must have `dtype`: with another the modules return another dtype than the ops.
    """
    if type(block) not in CLASSES or not runs_own_forward(block):
        return False
    attention_class, processor_class, rope_class = CLASSES[type(block)]
    attentions = (block.attn1, block.attn2)
    layer_norms = [block.norm1, block.norm3, *([block.norm2] if _has_norm2(block) else [])]
    rms_norms = (block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q)
    key_norms = [norm for norm in block.attn2.children() if isinstance(norm, nn.RMSNorm)]  # called as modules
    return (
        all(map(is_plain, (transformer.rope, block.norm2, *layer_norms, *attentions, *rms_norms)))
        and type(transformer.rope) is rope_class
        and all(type(norm) is FP32LayerNorm for norm in layer_norms)
        and all(type(norm) is nn.RMSNorm and norm.eps is not None for norm in rms_norms)
        and block.attn1.norm_q.eps == block.attn1.norm_k.eps
        and all(type(attention) is attention_class for attention in attentions)
        and all(type(attention.processor) is processor_class for attention in attentions)
        and all(attention.processor._parallel_config is None for attention in attentions)
        and not any(attention.fused_projections for attention in attentions)
        and all(weight.dtype in (dtype, torch.float32) for norm in layer_norms for weight in norm.parameters())
        and all(weight.dtype is dtype for norm in (*rms_norms, *key_norms) for weight in norm.parameters())
    )


def forward(
    run: Run,
    index: int,
    block: Any,
    *,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """[R, S, C] -> [R, S, C] for the rows that `run` has in hand.

    hidden_states and encoder_hidden_states [R, image + text, C] have R rows; temb one per video; rotary_emb and the
    attention_mask of SkyReels-V2's diffusion forcing none. Prompts have no mask: key_lengths is None.
    """
    row_map = run.videos_of_rows(hidden_states.device)
    modulation = block.scale_shift_table + _of_tokens(block, temb).float()  # [B, 1 or S, 6, C]
    shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.unbind(2)
    cos, sin = run.once("pairs", rotary_emb, lambda: _pairs(rotary_emb))

    values: list[Tensor] = []

    def self_attention(hidden_states: Tensor) -> Tensor:
        attention = block.attn1
        q, k, v = (
            _heads(attention, project(hidden_states)) for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        values[:] = [v]
        norm_q, norm_k = attention.norm_q, attention.norm_k
        q, k = qk_norm_rope(q, k, q_weight=norm_q.weight, k_weight=norm_k.weight, cos=cos, sin=sin, eps=norm_q.eps)
        return project_out(attention, attend(attention.processor, q, k, v, attention_mask))

    def cross_attention(hidden_states: Tensor) -> Tensor:
        attention = block.attn2
        q = attention.to_q(hidden_states).contiguous()
        q = _heads(attention, norm_modulate(q, weight=attention.norm_q.weight, eps=attention.norm_q.eps))

        def read(tokens: Tensor, to_k: nn.Module, norm_k: nn.Module, to_v: nn.Module) -> Tensor:
            k, v = _heads(attention, norm_k(to_k(tokens))), _heads(attention, to_v(tokens))
            return attend(attention.processor, q, k, v)

        if attention.add_k_proj is None:
            out = read(encoder_hidden_states, attention.to_k, attention.norm_k, attention.to_v)
        else:
            border = encoder_hidden_states.shape[1] - TEXT
            image, text = encoder_hidden_states[:, :border], encoder_hidden_states[:, border:]
            out = read(text, attention.to_k, attention.norm_k, attention.to_v)
            out = out + read(image, attention.add_k_proj, attention.norm_added_k, attention.add_v_proj)
        return project_out(attention, out)

    x = hidden_states.contiguous()  # SkyReels-V2 hands on a transposed view
    normed = norm_modulate(x, scale_attn, shift_attn, **_layer_norm(block.norm1), row_map=row_map)
    attended = run.self_attention(
        index,
        block.attn1,
        self_attention,
        {"hidden_states": normed},
        carriers=("hidden_states",),
        values_again=lambda rows: project_out(block.attn1, select(values[0], rows, len(values[0]))),
    )
    if _has_norm2(block):
        x, normed = residual_gate_norm_modulate(x, attended, gate_attn, **_layer_norm(block.norm2), row_map=row_map)
    else:
        x = normed = residual_gate(x, attended, gate_attn, row_map=row_map)
    x, normed = residual_gate_norm_modulate(
        x, cross_attention(normed), None, scale_ff, shift_ff, **_layer_norm(block.norm3), row_map=row_map
    )
    return residual_gate(x, feed_forward(block.ffn, normed), gate_ff, row_map=row_map)


def _has_norm2(block: Any) -> bool:
    return type(block.norm2) is not nn.Identity


def _layer_norm(norm: FP32LayerNorm) -> dict[str, Any]:
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps, "subtract_mean": True}


def _of_tokens(block: Any, temb: Tensor) -> Tensor:
    """[B, 6, C], Wan's [B, S, 6, C] or SkyReels-V2's [B, 6, S, C] -> [B, 1 or S, 6, C]."""
    if temb.ndim == 3:
        return temb.unsqueeze(1)
    return temb if type(block) is wan.WanTransformerBlock else temb.transpose(1, 2)


def _pairs(rotary_emb: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[1, S, 1, D] with every value twice -> float32 [1, S, 1, D / 2]."""
    cos, sin = rotary_emb
    return cos[..., 0::2].float().contiguous(), sin[..., 1::2].float().contiguous()


def _heads(attention: Any, x: Tensor) -> Tensor:
    """[R, S, C] -> [R, S, N, D]."""
    return x.contiguous().unflatten(2, (attention.heads, -1))
