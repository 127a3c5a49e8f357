"""Latte (diffusers `LatteTransformer3DModel`): spatial blocks, which read the prompt, and temporal ones, in turn."""

from __future__ import annotations

from stg_engine.models.base import ModelSpec, register, value_passthrough

LATTE = register(
    ModelSpec(
        family="Latte",
        transformer="LatteTransformer3DModel",
        blocks=("transformer_blocks.*",),
        temporal_blocks=("temporal_transformer_blocks.*",),
        latents=("hidden_states", "timestep"),
        prompt=("encoder_hidden_states", "encoder_attention_mask"),
        several_entries=("encoder_attention_mask",),  # diffusers wants one per frame
        streams=("hidden_states",),
        block_rows=("encoder_hidden_states", "encoder_attention_mask", "timestep"),
        prompt_rows=("encoder_hidden_states",),
        between_blocks={},
        self_attention=("attn1",),
        attention_rows=("hidden_states",),
        attention_skip=value_passthrough,
        shares_attention=True,
        once_per_step={"pos_embed": (0,)},
        time_embedding=("adaln_single",),
        once_per_prompt=("caption_projection",),
        once_per_prompt_in_block=("attn2.to_k", "attn2.to_v"),
        per_row={"norm_out": (0,), "proj_out": (0,)},
    )
)
