"""Allegro (diffusers `AllegroTransformer3DModel`)."""

from __future__ import annotations

from stg_engine.models.base import ModelSpec, register, value_passthrough

ALLEGRO = register(
    ModelSpec(
        family="Allegro",
        transformer="AllegroTransformer3DModel",
        blocks=("transformer_blocks.*",),
        latents=("hidden_states", "timestep", "attention_mask"),
        prompt=("encoder_hidden_states", "encoder_attention_mask"),
        prompt_mask="encoder_attention_mask",
        streams=("hidden_states",),
        block_rows=("encoder_hidden_states", "temb", "attention_mask", "encoder_attention_mask"),
        self_attention=("attn1",),
        attention_rows=("hidden_states", "attention_mask"),
        attention_skip=value_passthrough,
        shares_attention=True,
        once_per_step={"pos_embed": (0,)},
        time_embedding=("adaln_single",),
        once_per_prompt=("caption_projection",),
        once_per_prompt_in_block=("attn2.to_k", "attn2.to_v"),
        per_row={"norm_out": (0,), "proj_out": (0,)},
    )
)
