"""CogVideoX 2B, 5B, 1.5 (diffusers `CogVideoXTransformer3DModel`): joint attention with shared weights, text first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stg_engine.models.base import ModelSpec, register

if TYPE_CHECKING:
    from torch import Tensor, nn


def own_key_attention(attention: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Joint attention in which a video token sees itself and the text alone: STG-A as Mochi has it.

    The first STGuidance release masks as if the video stood first; here the text does, [text; video]. Text tokens see
    everything. As `CogVideoXAttnProcessor2_0` otherwise. Returns video [R, S, C] and text [R, T, C].
    """
    import torch
    from diffusers.models.embeddings import apply_rotary_emb
    from stg_kernels import branch_attention

    x, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    tokens = text.shape[1]
    joint = torch.cat([text, x], dim=1)
    q, k, v = (to(joint).unflatten(2, (attention.heads, -1)) for to in (attention.to_q, attention.to_k, attention.to_v))
    q, k = attention.norm_q(q), attention.norm_k(k)
    rope = arguments.get("image_rotary_emb")
    if rope is not None:
        q, k = (
            torch.cat([y[:, :tokens], apply_rotary_emb(y[:, tokens:], rope, sequence_dim=1)], dim=1) for y in (q, k)
        )
    q, k = q.to(v), k.to(v)  # under autocast the norms may return float32
    out = branch_attention(q, k, v, own_key_rows=range(len(q)), text=(0, tokens)).flatten(2)
    projection, dropout = attention.to_out
    out = dropout(projection(out))
    return out[:, tokens:], out[:, :tokens]


COGVIDEOX = register(
    ModelSpec(
        family="CogVideoX",
        transformer="CogVideoXTransformer3DModel",
        blocks=("transformer_blocks.*",),
        latents=("hidden_states", "timestep"),  # the pipelines' `ofs` has one entry, whatever the number of videos
        prompt=("encoder_hidden_states",),
        streams=("hidden_states", "encoder_hidden_states"),
        block_rows=("temb",),
        shared_rows=("temb",),
        self_attention=("attn1",),
        attention_rows=("hidden_states", "encoder_hidden_states"),
        attention_skip=own_key_attention,
        prompt_block=-1,
        once_per_step={"time_embedding": (0,), "patch_embed.proj": (0,)},
        once_per_prompt=("patch_embed.text_proj",),
        per_row={"norm_final": (0,), "norm_out": (0, "temb"), "proj_out": (0,)},
        fused="cogvideox",
        presets={30: "cogvideox-2b", 42: "cogvideox-5b"},
    )
)
