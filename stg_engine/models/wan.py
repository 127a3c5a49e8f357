"""Wan 2.1 and 2.2 (diffusers `WanTransformer3DModel`) and SkyReels-V2, a Wan with frames of different noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stg_engine.models.base import ModelSpec, register

if TYPE_CHECKING:
    from torch import Tensor, nn


def value_passthrough(attention: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Self-attention whose map is the identity: `to_out(to_v(x))`, [R, S, C] -> [R, S, C] (arXiv 2411.18664 Eq. 17).

    After `fuse_qkv_projections` the model reads `to_qkv` alone, and so does this.
    """
    x = arguments["hidden_states"]
    v = attention.to_qkv(x).chunk(3, dim=-1)[2] if attention.fused_projections else attention.to_v(x)
    projection, dropout = attention.to_out
    return dropout(projection(v))


WAN = register(
    ModelSpec(
        family="Wan",
        transformer="WanTransformer3DModel",
        blocks=("blocks.*",),
        latents=("hidden_states", "timestep"),
        # Image tokens go the way of the prompt: what follows from both is one tensor in the blocks.
        prompt=("encoder_hidden_states", "encoder_hidden_states_image"),
        several_entries=("encoder_hidden_states_image",),  # first and last frame
        streams=("hidden_states",),
        block_rows=("encoder_hidden_states", "temb"),
        shared_rows=("temb",),
        prompt_rows=("encoder_hidden_states",),
        self_attention=("attn1",),
        attention_rows=("hidden_states",),
        attention_skip=value_passthrough,
        shares_attention=True,
        once_per_step={
            "patch_embedding": (0,),
            "condition_embedder.timesteps_proj": (0,),
            "condition_embedder.time_embedder": (0,),
            "condition_embedder.act_fn": (0,),
            "condition_embedder.time_proj": (0,),
        },
        once_per_prompt=("condition_embedder.text_embedder", "condition_embedder.image_embedder"),
        once_per_prompt_in_block=(
            *("attn2.to_k", "attn2.norm_k", "attn2.to_v", "attn2.to_kv"),
            *("attn2.add_k_proj", "attn2.norm_added_k", "attn2.add_v_proj", "attn2.to_added_kv"),
        ),
        per_row={"proj_out": (0,)},
        fused="wan",
        presets={30: "wan-2.1-1.3b-community", 40: "wan-2.1-14b-community"},
    )
)

SKYREELS_V2 = register(replace(WAN, family="SkyReels-V2", transformer="SkyReelsV2Transformer3DModel", presets={}))
