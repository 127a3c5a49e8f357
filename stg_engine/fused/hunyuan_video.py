"""The blocks of HunyuanVideo and HunyuanVideo-1.5: the modules' own, but for attention by key lengths.

A mask keeps flash attention from running, and HunyuanVideo-1.5's is dense, [S, S] per row and block.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTokenReplaceSingleTransformerBlock,
    HunyuanVideoTokenReplaceTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
    HunyuanVideo15TransformerBlock,
)
from torch import Tensor

from stg_engine.fused.parts import chosen_in_diffusers
from stg_engine.hooks import is_plain, runs_own_forward
from stg_engine.joint import joint_attention
from stg_engine.rows import Run

ATTENTION_ALONE = True
PROCESSORS = (HunyuanVideoAttnProcessor2_0, HunyuanVideo15AttnProcessor2_0)
BLOCKS = (
    HunyuanVideoTransformerBlock,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTokenReplaceTransformerBlock,
    HunyuanVideoTokenReplaceSingleTransformerBlock,
    HunyuanVideo15TransformerBlock,
)


def supports(transformer: Any, block: Any, dtype: torch.dtype) -> bool:
    """True if the block, its attention and its processor are diffusers' own, and no backend was chosen there."""
    return (
        type(block) in BLOCKS
        and runs_own_forward(block)
        and type(block.attn) is Attention
        and is_plain(block.attn)
        and type(block.attn.processor) in PROCESSORS
        and not chosen_in_diffusers(block.attn.processor)
        and all(norm is not None for norm in (block.attn.norm_q, block.attn.norm_k))
    )


class KeyLengths:
    """In the place of diffusers' processor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        return joint_attention(
            attn,
            {
                "hidden_states": hidden_states,
                "encoder_hidden_states": encoder_hidden_states,
                "attention_mask": attention_mask,
                "image_rotary_emb": image_rotary_emb,
            },
        )


def forward(run: Run, index: int, block: Any, *, key_lengths: Tensor | None = None, **arguments: Any) -> Any:
    """The block's own forward with `KeyLengths`; the mask says the lengths."""
    own, block.attn.processor = block.attn.processor, KeyLengths()
    try:
        return type(block).forward(block, **arguments)
    finally:
        block.attn.processor = own
