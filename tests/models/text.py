"""Tiny tokenizers and text encoders from nothing."""

from __future__ import annotations

import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer


def tiny_t5(seed: int = 0) -> dict[str, object]:
    """{"tokenizer": letters, "text_encoder": 32 channels wide}."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters, *(f"▁{letter}" for letter in letters)]
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        dropout_rate=0.0,
    )
    return {
        "tokenizer": T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0),
        "text_encoder": T5EncoderModel(config).eval(),
    }
