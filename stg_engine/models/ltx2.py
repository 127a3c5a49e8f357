"""LTX-2 and LTX-2.3 (diffusers `LTX2VideoTransformer3DModel`): video and audio streams that attend to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stg_engine.models.base import ModelSpec, register

if TYPE_CHECKING:
    from torch import Tensor, nn


def gated_value_passthrough(attention: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Self-attention whose map is the identity: `to_out(gate * to_v(x))`, [R, S, C] -> [R, S, C].

    The gate is per head, `2 sigmoid(to_gate_logits(x))`, in models that have one (LTX-2.3), else 1. As
    `LTX2PerturbedAttnProcessor` computes it, for video and for audio. In LTX-2.0, whose config says
    `perturbed_attn=False`, diffusers' own STG pass silently equals cond; here it works with those weights too.
    """
    import torch

    x = arguments["hidden_states"]
    values = attention.to_v(x)
    if attention.to_gate_logits is not None:
        gates = 2.0 * torch.sigmoid(attention.to_gate_logits(x))
        values = (values.unflatten(2, (attention.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
    projection, dropout = attention.to_out
    return dropout(projection(values))


LTX_2 = register(
    ModelSpec(
        family="LTX-2",
        transformer="LTX2VideoTransformer3DModel",
        blocks=("transformer_blocks.*",),
        latents=(
            *("hidden_states", "audio_hidden_states", "timestep", "audio_timestep", "sigma", "audio_sigma"),
            *("video_coords", "audio_coords", "video_self_attention_mask", "video_keyframes_mask"),
        ),
        prompt=(
            *("encoder_hidden_states", "audio_encoder_hidden_states"),
            *("encoder_attention_mask", "audio_encoder_attention_mask"),
        ),
        streams=("hidden_states", "audio_hidden_states"),
        block_rows=(
            *("encoder_hidden_states", "audio_encoder_hidden_states"),
            *("encoder_attention_mask", "audio_encoder_attention_mask", "self_attention_mask"),
            *("temb", "temb_audio", "temb_prompt", "temb_prompt_audio"),
            *("temb_ca_scale_shift", "temb_ca_audio_scale_shift", "temb_ca_gate", "temb_ca_audio_gate"),
            *("video_rotary_emb", "audio_rotary_emb", "ca_video_rotary_emb", "ca_audio_rotary_emb"),
        ),
        self_attention=("attn1", "audio_attn1"),
        attention_rows=(
            *("hidden_states", "encoder_hidden_states", "attention_mask"),
            *("query_rotary_emb", "key_rotary_emb"),
        ),
        attention_skip=gated_value_passthrough,
        links=("audio_to_video_attn", "video_to_audio_attn"),
        velocity_of=("hidden_states", "audio_hidden_states"),
        shares_attention=True,
        once_per_step=dict.fromkeys(
            ("proj_in", "audio_proj_in", "rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope"), (0,)
        ),
        time_embedding=(
            *("time_embed", "audio_time_embed", "prompt_adaln", "audio_prompt_adaln"),
            *("av_cross_attn_video_scale_shift", "av_cross_attn_video_a2v_gate"),
            *("av_cross_attn_audio_scale_shift", "av_cross_attn_audio_v2a_gate"),
        ),
        once_per_prompt=("caption_projection", "audio_caption_projection"),
        # With `cross_attn_mod` (LTX-2.3) the timestep modulates the text in every block: a new tensor, never kept.
        once_per_prompt_in_block=tuple(
            f"{modality}attn2.{name}" for modality in ("", "audio_") for name in ("to_k", "norm_k", "to_v")
        ),
        per_row={"proj_out": (0,), "audio_proj_out": (0,)},
        presets={48: "ltx-2.3"},
    )
)
