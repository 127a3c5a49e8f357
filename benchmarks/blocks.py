"""The fused blocks in the sizes of the published models, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import stg_kernels
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from diffusers.models.transformers.transformer_mochi import MochiTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from benchmarks.shapes import Shape
from stg_engine.fused import cogvideox, ltx, mochi, wan

ROWS, TOKENS, TEXT = 2, 16, 8
OPS = ("norm_modulate", "qk_norm_rope", "residual_gate", "residual_gate_norm_modulate")
Built = tuple[Any, Any, dict[str, Any]]
"""Module of `stg_engine.fused`, block, arguments of the fused forward beside the video stream."""


def _ltx(shape: Shape, empty: Callable[..., Tensor]) -> Built:
    c = shape.channels
    block = LTXVideoTransformerBlock(c, shape.heads, shape.head_size, cross_attention_dim=c)
    tables = torch.empty(ROWS, TOKENS, c), torch.empty(ROWS, TOKENS, c)
    arguments = {"encoder_hidden_states": empty(ROWS, TEXT, c), "temb": empty(ROWS, 1, 6 * c)}
    return ltx, block, {**arguments, "image_rotary_emb": tables}


def _mochi(shape: Shape, empty: Callable[..., Tensor]) -> Built:
    c, text = shape.channels, shape.channels // 2
    block = MochiTransformerBlock(c, shape.heads, shape.head_size, text, activation_fn="swiglu")
    size = TOKENS, shape.heads, shape.head_size // 2
    arguments = {"encoder_hidden_states": empty(ROWS, TEXT, text), "temb": empty(ROWS, c)}
    rope = torch.empty(size), torch.empty(size)
    return mochi, block, {**arguments, "image_rotary_emb": rope, "encoder_attention_mask": torch.ones(ROWS, TEXT)}


def _cogvideox(shape: Shape, empty: Callable[..., Tensor]) -> Built:
    c, size = shape.channels, (TOKENS, shape.head_size)
    block = CogVideoXBlock(c, shape.heads, shape.head_size, 512)
    arguments: dict[str, Any] = {"encoder_hidden_states": empty(ROWS, TEXT, c), "temb": empty(ROWS, 512)}
    if not shape.model.startswith("CogVideoX-2B"):  # its positions are added before the blocks
        arguments["image_rotary_emb"] = torch.empty(size), torch.empty(size)
    return cogvideox, block, arguments


def _wan(shape: Shape, empty: Callable[..., Tensor]) -> Built:
    c, size = shape.channels, (1, TOKENS, 1, shape.head_size)
    block = WanTransformerBlock(c, 2 * c, shape.heads, qk_norm="rms_norm_across_heads", cross_attn_norm=True)
    arguments = {"encoder_hidden_states": empty(ROWS, TEXT, c), "temb": torch.empty(ROWS, 6, c)}
    return wan, block, {**arguments, "rotary_emb": (torch.empty(size), torch.empty(size))}


BLOCKS = {"LTX": _ltx, "Mochi": _mochi, "CogVideoX": _cogvideox, "Wan": _wan}
"""How a shape's model begins -> its block."""


def _loaded(block: Any, dtype: torch.dtype) -> Any:
    """Weights of `dtype`, but for norms and tables that loading leaves in float32 (Wan)."""
    block = block.to(dtype)
    if isinstance(block, WanTransformerBlock):
        block.norm2.float()
        block.scale_shift_table.data = block.scale_shift_table.data.float()
    return block


def has_fused_block(shape: Shape) -> bool:
    return shape.model.startswith(tuple(BLOCKS))


def run_fused_block(shape: Shape, dtype: torch.dtype, row_map: Tensor | None) -> None:
    """The fused forward of the shape's block, two rows, every op as Triton."""
    run = SimpleNamespace(
        videos_of_rows=lambda device: row_map,
        is_padded=False,
        max_rows=None,
        once=lambda name, source, compute: compute(),
        skipping_attention=lambda index: [],
        self_attention=lambda index, module, forward, arguments, **_: forward(**arguments),
    )
    build = next(build for name, build in BLOCKS.items() if shape.model.startswith(name))
    with torch.device("meta"), torch.no_grad():
        family, block, arguments = build(shape, partial(torch.empty, dtype=dtype))
        x = torch.empty(ROWS, TOKENS, shape.channels, dtype=dtype)
        with mock.patch.multiple(family, **{op: partial(getattr(stg_kernels, op), impl="fused") for op in OPS}):
            family.forward(run, 0, _loaded(block, dtype), hidden_states=x, **arguments)
