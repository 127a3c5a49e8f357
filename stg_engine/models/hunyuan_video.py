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
    """Joint attention in which a video token sees itself and the text alone (STG-A, junhahyung/STGuidance).

    As diffusers' processors otherwise. The mask, bool [R, 1, 1, S + T] or [R, T], has its padding last: nothing sees
    it, and nothing reads what it gets here. Returns video [R, S, C] and text [R, T, C]. Single-stream blocks have no
    weights of their own for text, and their output projections outside the attention.
    """
    import torch
    from diffusers.models.embeddings import apply_rotary_emb
    from stg_kernels import branch_attention

    video, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    size = video.shape[1]
    projections = (attention.to_q, attention.to_k, attention.to_v)
    if attention.add_q_proj is None:
        q, k, v = (to(torch.cat([video, text], 1)).unflatten(2, (attention.heads, -1)) for to in projections)
        q, k = attention.norm_q(q), attention.norm_k(k)
        (q, text_q), (k, text_k), (v, text_v) = (x.split([size, text.shape[1]], 1) for x in (q, k, v))
    else:
        added = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
        q, k, v = (to(video).unflatten(2, (attention.heads, -1)) for to in projections)
        q, k = attention.norm_q(q), attention.norm_k(k)
        text_q, text_k, text_v = (to(text).unflatten(2, (attention.heads, -1)) for to in added)
        text_q, text_k = attention.norm_added_q(text_q), attention.norm_added_k(text_k)
    q, k = (apply_rotary_emb(x, arguments["image_rotary_emb"], sequence_dim=1) for x in (q, k))
    q, k, v = (torch.cat(pair, 1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
    padding = arguments["attention_mask"].logical_not().flatten(1).sum(1, dtype=torch.int32)
    out = branch_attention(
        q, k, v, key_lengths=q.shape[1] - padding, own_key_rows=range(len(q)), text=(size, q.shape[1])
    ).flatten(2, 3)  # fmt: skip
    video, text = out[:, :size], out[:, size:]
    if attention.to_out is not None:
        projection, dropout = attention.to_out
        video = dropout(projection(video))
    return video, text if attention.to_add_out is None else attention.to_add_out(text)


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
