"""Latte."""

from contextlib import contextmanager

import torch
from diffusers import LatteTransformer3DModel
from models.case import Case, block_inputs_returned, randomise, replaced_forwards


def model(dtype, caption_channels=8):
    torch.manual_seed(0)
    return randomise(
        LatteTransformer3DModel(
            sample_size=8,
            num_layers=4,
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=4,
            caption_channels=caption_channels,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            video_length=3,
        )
    ).to(dtype)


def inputs(videos, dtype):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    shared = {"hidden_states": normal(videos, 4, 3, 8, 8), "timestep": torch.tensor([700] * videos)}
    cond, uncond = ({"encoder_hidden_states": normal(videos, 6, 8)} for _ in range(2))
    return shared, cond, uncond


def one_frame(videos, dtype):
    """An image, the only case in which diffusers takes a mask with one entry per video: a bias [B, 1, T]."""
    shared, cond, uncond = inputs(videos, dtype)
    shared["hidden_states"] = shared["hidden_states"][:, :, :1]
    bias = torch.arange(6) >= torch.tensor([[3, 6, 1], [2, 4, 5]])[:, :videos, None]
    for prompt, row in zip((cond, uncond), bias, strict=True):
        prompt["encoder_attention_mask"] = row[:, None].to(dtype) * -10000
    return shared, cond, uncond


def masks_per_frame(videos, dtype):
    """Where there are several frames diffusers takes a bias [B * F, 1, T] alone."""
    shared, _, _ = inputs(videos, dtype)
    masked = one_frame(videos, dtype)[1:]
    for prompt in masked:
        prompt["encoder_attention_mask"] = prompt["encoder_attention_mask"].repeat_interleave(3, dim=0)
    return shared, *masked


def values_out(attention, hidden_states, **_):
    """STG-A: the attention map is the identity, arXiv 2411.18664 Eq. 17, in one of the factorised attentions."""
    return attention.to_out[0](attention.to_v(hidden_states))


def blocks_of(transformer, skip):
    lists = {"spatial": transformer.transformer_blocks, "temporal": transformer.temporal_transformer_blocks}
    return [blocks[i] for axis, blocks in lists.items() if skip.axis in (None, axis) for i in skip.layers]


@contextmanager
def skipped(transformer, skip):
    blocks = blocks_of(transformer, skip)
    if skip.mode == "residual":
        with block_inputs_returned(blocks, ("hidden_states",)):
            yield
    else:
        with replaced_forwards([block.attn1 for block in blocks], values_out):
            yield


CASES = [
    Case("Latte", model, inputs, skipped, axes=("spatial", "temporal")),
    Case("Latte, a video with masks", model, masks_per_frame, skipped, axes=("spatial", "temporal")),
    # Attention over one frame is V already. Entries of a row: one frame, or 16 patches.
    Case("Latte, an image with masks", model, one_frame, skipped, axes=("spatial",), widths=2),
]
