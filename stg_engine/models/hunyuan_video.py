"""HunyuanVideo (`HunyuanVideoTransformer3DModel`) and HunyuanVideo-1.5 (`HunyuanVideo15Transformer3DModel`).

HunyuanVideo has dual-stream blocks, then single-stream ones; layers are numbered over both lists in execution order.
With or without embedded guidance, and the image-to-video variants `latent_concat` and `token_replace`.

HunyuanVideo-1.5 has dual-stream blocks alone. Its forward puts the valid tokens of image, ByT5 and Qwen first: a row's
keys are a prefix. Whether there is an image at all it decides for the whole batch, from `image_embeds`: all videos have
one, or none has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stg_engine.models.base import ModelSpec, register

if TYPE_CHECKING:
    from torch import Tensor, nn


def own_key_attention(attention: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Joint attention in which a video token sees itself and the text alone (STG-A, junhahyung/STGuidance)."""
    from stg_engine.joint import joint_attention

    return joint_attention(attention, arguments, range(len(arguments["hidden_states"])))


HUNYUAN_VIDEO = register(
    ModelSpec(
        family="HunyuanVideo",
        transformer="HunyuanVideoTransformer3DModel",
        blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
        count_layers=lambda config: config["num_layers"] + config["num_single_layers"],
        latents=("hidden_states", "timestep", "guidance"),
        prompt=("encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
        streams=("hidden_states", "encoder_hidden_states"),
        block_rows=("temb", "attention_mask", "token_replace_emb"),
        self_attention=("attn",),
        attention_rows=("hidden_states", "encoder_hidden_states", "attention_mask"),
        attention_skip=own_key_attention,
        prompt_block=-1,
        once_per_step={"x_embedder": (0,)},
        per_row={
            "time_text_embed": (0, 1, 2),
            "context_embedder": (0, 1, 2),
            "norm_out": (0, 1),
            "proj_out": (0,),
        },
        fused="hunyuan_video",
        presets={60: "hunyuan-video"},
    )
)

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
        self_attention=("attn",),
        attention_rows=("hidden_states", "encoder_hidden_states", "attention_mask"),
        attention_skip=own_key_attention,
        prompt_block=-1,
        once_per_step={"x_embedder": (0,), "time_embed": (0, "timestep_r"), "image_embedder": (0,)},
        once_per_prompt=("context_embedder_2",),
        per_row={"context_embedder": (0, 1, 2), "norm_out": (0, 1), "proj_out": (0,)},
        fused="hunyuan_video",
        waits_in="forward",  # it looks whether an image's values are all 0
    )
)
