"""Allegro, with a mask over the video's patches."""

import torch
from diffusers import AllegroTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from models.case import Case, block_inputs_returned, randomise, replaced_forwards

FRAMES, SIZE, TEXT = 2, 8, 6


def model(dtype, caption_channels=8):
    torch.manual_seed(0)
    return randomise(
        AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=4,
            cross_attention_dim=24,
            sample_height=SIZE,
            sample_width=SIZE,
            sample_frames=FRAMES,
            caption_channels=caption_channels,
        )
    ).to(dtype)


def rope():
    """As the pipeline passes it: tables per axis and the places of the tokens in them."""
    grid = (FRAMES, SIZE // 2, SIZE // 2)
    *tables, _, _, _ = get_3d_rotary_pos_embed_allegro(12, ((0, 0), grid[1:]), grid[1:], FRAMES, (2.2, 2.0, 2.0))
    places = torch.cartesian_prod(*map(torch.arange, grid)).T[:, None].contiguous()
    return tuple(tables), tuple(places)


def inputs(videos, dtype):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    patches = torch.ones(videos, FRAMES, SIZE, SIZE)
    patches[-1, :, 4:] = 0  # another mask in each video
    shared = {
        "hidden_states": normal(videos, 4, FRAMES, SIZE, SIZE),
        "timestep": torch.tensor([700, 650, 300])[:videos],
        "attention_mask": patches,
        "image_rotary_emb": rope(),
    }
    masks = (torch.arange(TEXT) < torch.tensor([[3, 6, 1], [2, 4, 5]])[:, :videos, None]).long()
    cond, uncond = (
        {"encoder_hidden_states": normal(videos, 1, TEXT, 8), "encoder_attention_mask": mask} for mask in masks
    )
    return shared, cond, uncond


def values(attention, hidden_states, **_):
    """STG-A: the attention map is the identity, arXiv 2411.18664 Eq. 17."""
    return attention.to_out[0](attention.to_v(hidden_states))


def skipped(transformer, skip):
    blocks = [transformer.transformer_blocks[layer] for layer in skip.layers]
    if skip.mode == "residual":
        return block_inputs_returned(blocks, ("hidden_states",))
    return replaced_forwards([block.attn1 for block in blocks], values)


CASES = [Case("Allegro", model, inputs, skipped)]
