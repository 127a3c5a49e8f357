"""Sana-Video (diffusers `SanaVideoTransformer3DModel`): linear self-attention, softmax attention to the prompt."""

from __future__ import annotations

from stg_engine.models.base import ModelSpec, register, value_passthrough

SANA_VIDEO = register(
    ModelSpec(
        family="Sana-Video",
        transformer="SanaVideoTransformer3DModel",
        blocks=("transformer_blocks.*",),
        latents=("hidden_states", "timestep", "guidance"),
        prompt=("encoder_hidden_states", "encoder_attention_mask"),
        prompt_mask="encoder_attention_mask",
        streams=("hidden_states",),
        block_rows=("encoder_hidden_states", "encoder_attention_mask", "timestep"),
        self_attention=("attn1",),
        attention_rows=("hidden_states",),
        attention_skip=value_passthrough,
        shares_attention=True,
        once_per_step={"patch_embedding": (0,), "time_embed": (0, "guidance")},
        once_per_prompt=("caption_projection", "caption_norm"),
        once_per_prompt_in_block=("attn2.to_k", "attn2.norm_k", "attn2.to_v"),
        per_row={"norm_out": (0, 1), "proj_out": (0,)},
        velocity_of=("hidden_states",),
    )
)
