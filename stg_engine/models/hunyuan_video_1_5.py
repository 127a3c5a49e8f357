"""HunyuanVideo-1.5 (diffusers `HunyuanVideo15Transformer3DModel`): joint attention over video and three conditions.

The forward puts the valid tokens of image, ByT5 and Qwen first, so that a row's keys are a prefix. Whether there is an
image at all it decides for the whole batch, from `image_embeds`: either all videos have one or none.
"""

from __future__ import annotations

from stg_engine.models.base import ModelSpec, register
from stg_engine.models.hunyuan_video import own_key_attention

HUNYUAN_VIDEO_1_5 = register(
    ModelSpec(
        family="HunyuanVideo-1.5",
        transformer="HunyuanVideo15Transformer3DModel",
        blocks=("transformer_blocks.*",),
        latents=("hidden_states", "timestep", "timestep_r", "image_embeds"),
        prompt=(
            "encoder_hidden_states",
            "encoder_attention_mask",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
        ),
        streams=("hidden_states", "encoder_hidden_states"),
        block_rows=("temb", "attention_mask"),
        shared_rows=("temb",),
        self_attention=("attn",),
        attention_rows=("hidden_states", "encoder_hidden_states", "attention_mask"),
        attention_skip=own_key_attention,
        prompt_block=-1,
        once_per_step={"x_embedder": (0,), "time_embed": (0, "timestep_r"), "image_embedder": (0,)},
        once_per_prompt=("context_embedder_2",),
        per_row={"context_embedder": (0, 1, 2), "norm_out": (0, 1), "proj_out": (0,)},
    )
)
