"""Stable Video Diffusion."""

from contextlib import contextmanager

import torch
from diffusers import UNetSpatioTemporalConditionModel
from models.case import Case, block_inputs_returned, randomise, replaced_forwards


def model(dtype):
    """4 layers: one on the way down, one in the middle at half the size, two on the way up."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=8,
        num_attention_heads=(2, 4),
        num_frames=3,
    )
    return randomise(unet, scale=0.1).to(dtype)


def inputs(videos, dtype):
    """3 frames; the channels are noisy latents and the image's, which are zeros without the prompt."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    noisy, image = normal(videos, 3, 4, 8, 8), normal(videos, 1, 4, 8, 8).repeat(1, 3, 1, 1, 1)
    shared = {
        "timestep": torch.tensor([1.2] * videos),
        "added_time_ids": torch.tensor([[6, 127, 0.02]] * videos).to(dtype),
    }
    cond, uncond = (
        {"sample": torch.cat([noisy, still], dim=2), "encoder_hidden_states": normal(videos, 1, 8)}
        for still in (image, torch.zeros_like(image))
    )
    return shared, cond, uncond


def values_out(attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
    """STG-A: the attention map is the identity, arXiv 2411.18664 Eq. 17, in one of the factorised attentions."""
    return attention.to_out[0](attention.to_v(hidden_states))


def layers_of(unet):
    """(spatial block, temporal block) in the order in which the UNet runs them."""
    stages = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    transformers = [transformer for stage in stages for transformer in getattr(stage, "attentions", ())]
    return [(t.transformer_blocks[0], t.temporal_transformer_blocks[0]) for t in transformers]


@contextmanager
def skipped(unet, skip):
    layers = [layers_of(unet)[i] for i in skip.layers]
    pick = {"spatial": slice(0, 1), "temporal": slice(1, 2), None: slice(0, 2)}[skip.axis]
    blocks = [block for layer in layers for block in layer[pick]]
    if skip.mode == "residual":
        with block_inputs_returned(blocks, ("hidden_states",)):
            yield
    else:
        with replaced_forwards([block.attn1 for block in blocks], values_out):
            yield


# A row's entries are 3 frames in spatial blocks; so they are in temporal ones, which fold patches inside.
CASES = [Case("SVD", model, inputs, skipped, axes=("spatial", "temporal"))]
