"""Joint attention of diffusers' `Attention`, video first and text last, as one `stg_kernels.branch_attention`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from stg_kernels import branch_attention
from torch import Tensor


def joint_attention(
    attention: Any, arguments: Mapping[str, Any], own_key_rows: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Video [R, S, C] and text [R, T, C] of the module's arguments, by key lengths instead of a mask.

    As HunyuanVideo's processors otherwise. The mask, bool [R, 1, 1, S + T] or [R, T], has its padding last: nothing
    sees it, and nothing reads what it gets here. In `own_key_rows` a video token sees itself and the text alone.
    Single-stream blocks have no weights of their own for text, and their output projections outside the attention.
    """
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
    q, k = q.to(v), k.to(v)  # under autocast the norms return float32
    padding = arguments["attention_mask"].logical_not().flatten(1).sum(1, dtype=torch.int32)
    out = branch_attention(
        q,
        k,
        v,
        key_lengths=q.shape[1] - padding,
        own_key_rows=own_key_rows,
        text=(size, q.shape[1]) if own_key_rows else None,
    ).flatten(2, 3)
    video, text = out[:, :size], out[:, size:]
    if attention.to_out is not None:
        projection, dropout = attention.to_out
        video = dropout(projection(video))
    return video, text if attention.to_add_out is None else attention.to_add_out(text)
