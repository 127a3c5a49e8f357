"""Stable Video Diffusion (diffusers `UNetSpatioTemporalConditionModel`): a layer is one block of its transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stg_engine.models.base import ModelSpec, register, value_passthrough


def _in_unet(path: str) -> tuple[str, ...]:
    return tuple(f"{stage}.{path}" for stage in ("down_blocks.*", "mid_block", "up_blocks.*"))


def count_layers(config: Mapping[str, Any]) -> int:
    """Spatio-temporal blocks: per resnet of a cross-attention stage, of which the way up has one more, and one mid."""
    down, up = config["down_block_types"], config["up_block_types"]

    def per_stage(value: int | list[int]) -> list[int]:
        return [value] * len(down) if isinstance(value, int) else list(value)

    resnets, depths = per_stage(config["layers_per_block"]), per_stage(config["transformer_layers_per_block"])
    ways = (zip(down, resnets, depths, strict=True), zip(up, [n + 1 for n in resnets[::-1]], depths[::-1], strict=True))
    return depths[-1] + sum(n * depth for way in ways for kind, n, depth in way if kind.startswith("CrossAttn"))


# With rows: a resnet's (hidden_states, temb) and image_only_indicator.
_BETWEEN = {
    "resnets.*": (0, 1, "image_only_indicator"),
    "downsamplers.*": (0,),
    "upsamplers.*": (0,),
    "attentions.*.norm": (0,),
    "attentions.*.proj_in": (0,),
    "attentions.*.proj_out": (0,),
}

SVD = register(
    ModelSpec(
        family="Stable Video Diffusion",
        transformer="UNetSpatioTemporalConditionModel",
        blocks=_in_unet("attentions.*.transformer_blocks.*"),
        temporal_blocks=_in_unet("attentions.*.temporal_transformer_blocks.*"),
        count_layers=count_layers,
        latents=("sample", "timestep", "added_time_ids"),
        scalars=("timestep",),
        prompt=("sample", "encoder_hidden_states"),  # uncond has zeros for the image's latents, among the channels
        streams=("hidden_states",),
        block_rows=("encoder_hidden_states",),
        between_blocks={
            **{path: rows for inner, rows in _BETWEEN.items() for path in _in_unet(inner)},
            **dict.fromkeys(("conv_in", "conv_norm_out", "conv_out"), (0,)),
        },
        self_attention=("attn1",),
        attention_rows=("hidden_states",),
        attention_skip=value_passthrough,
        prompt_block=-1,
        once_per_step=dict.fromkeys(
            ("time_embedding", "add_embedding", *_in_unet("attentions.*.time_pos_embed")), (0,)
        ),
        one_key_attention=("attn2",),
        presets={16: "svd"},
    )
)
