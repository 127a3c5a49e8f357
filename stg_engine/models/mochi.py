"""Mochi 1 (diffusers `MochiTransformer3DModel`): joint attention, video and text with weights of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stg_engine.models.base import ModelSpec, register

if TYPE_CHECKING:
    from torch import Tensor, nn


def own_key_attention(attention: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Joint attention in which a video token sees itself and the text alone (STG-A, junhahyung/STGuidance, Mochi).

    As `MochiAttnProcessor2_0` otherwise: text tokens see everything, padding is not seen and gives zeros before
    `to_add_out`. Returns video [R, S, C] and text [R, T, C'].
    """
    import torch
    from stg_kernels import branch_attention

    heads = attention.heads
    x, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    q, k, v = (to(x).unflatten(2, (heads, -1)) for to in (attention.to_q, attention.to_k, attention.to_v))
    q, k = attention.norm_q(q), attention.norm_k(k)
    rope = arguments.get("image_rotary_emb")
    if rope is not None:
        q, k = _rotate(q, *rope), _rotate(k, *rope)
    projections = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
    text_q, text_k, text_v = (to(text).unflatten(2, (heads, -1)) for to in projections)
    text_q, text_k = attention.norm_added_q(text_q), attention.norm_added_k(text_k)

    # diffusers moves the tokens that the mask keeps to the front, and leaves their results there.
    mask = arguments["attention_mask"].bool()
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[..., None, None]
    q, k, v = (
        torch.cat([video, torch.take_along_dim(tokens, order, dim=1)], dim=1).contiguous()
        for video, tokens in ((q, text_q), (k, text_k), (v, text_v))
    )
    size, end = x.shape[1], q.shape[1]
    kept = mask.sum(1, dtype=torch.int32)
    out = branch_attention(
        q, k, v, key_lengths=size + kept, own_key_rows=range(len(x)), text=(size, end)
    ).flatten(2, 3)  # fmt: skip
    is_padding = torch.arange(end - size, device=x.device) >= kept[:, None]
    out_text = out[:, size:].masked_fill(is_padding[..., None], 0)
    projection, dropout = attention.to_out
    if getattr(attention, "to_add_out", None) is not None:
        out_text = attention.to_add_out(out_text)
    return dropout(projection(out[:, :size])), out_text


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    import torch

    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


MOCHI = register(
    ModelSpec(
        family="Mochi",
        transformer="MochiTransformer3DModel",
        blocks=("transformer_blocks.*",),
        latents=("hidden_states", "timestep"),
        prompt=("encoder_hidden_states", "encoder_attention_mask"),
        prompt_mask="encoder_attention_mask",
        streams=("hidden_states", "encoder_hidden_states"),
        block_rows=("temb", "encoder_attention_mask"),
        self_attention=("attn1",),
        attention_rows=("hidden_states", "encoder_hidden_states", "attention_mask"),
        attention_skip=own_key_attention,
        prompt_block=-1,
        once_per_step={"patch_embed": (0,)},
        per_row={"time_embed": (0, 1, 2), "norm_out": (0, 1), "proj_out": (0,)},
        fused="mochi",
        presets={48: "mochi"},
        waits_in="blocks",
    )
)
