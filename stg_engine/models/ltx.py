"""LTX-Video 2B and 13B (diffusers `LTXVideoTransformer3DModel`)."""

from __future__ import annotations

from stg_engine.models.base import ModelSpec, register, value_passthrough

LTX_VIDEO = register(
    ModelSpec(
        family="LTX-Video",
        transformer="LTXVideoTransformer3DModel",
        blocks=("transformer_blocks.*",),
        latents=("hidden_states", "timestep", "video_coords"),
        prompt=("encoder_hidden_states", "encoder_attention_mask"),
        prompt_mask="encoder_attention_mask",
        streams=("hidden_states",),
        block_rows=("encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask"),
        shared_rows=("temb", "image_rotary_emb"),
        self_attention=("attn1",),
        attention_rows=("hidden_states", "image_rotary_emb"),
        attention_skip=value_passthrough,
        shares_attention=True,
        once_per_step={"proj_in": (0,), "rope": (0, 5)},
        time_embedding=("time_embed",),
        once_per_prompt=("caption_projection",),
        once_per_prompt_in_block=("attn2.to_k", "attn2.norm_k", "attn2.to_v"),
        per_row={"proj_out": (0,)},
        fused="ltx",
        velocity_of=("hidden_states",),
        presets={28: "ltx-video-2b", 48: "ltx-video-13b"},
    )
)
