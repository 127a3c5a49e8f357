"""Sana-Video, also with a timestep per token and a guidance embedding."""

from functools import partial

import torch
from diffusers import SanaVideoTransformer3DModel
from models.case import Case, block_inputs_returned, randomise, replaced_forwards

CHANNELS, FRAMES, SIZE, TEXT = 4, 2, 4, 6
TOKENS = FRAMES * (SIZE // 2) ** 2


def model(dtype, caption_channels=16, **config):
    torch.manual_seed(0)
    return randomise(
        SanaVideoTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=caption_channels,
            rope_max_seq_len=32,
            **config,
        ),
        scale=0.1,
    ).to(dtype)


def inputs(videos, dtype, timestep=(), **call):
    """Timesteps of shape [videos, *timestep]; each of `call` has an entry per video."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    times = torch.tensor([700, 650, 300])[:videos].view(-1, *[1] * len(timestep)).repeat(1, *timestep)
    if timestep:
        times[:, : timestep[0] // 2] = 0  # a frame that is given
    shared = {"hidden_states": normal(videos, CHANNELS, FRAMES, SIZE, SIZE), "timestep": times}
    shared |= {name: value[:videos] for name, value in call.items()}
    masks = (torch.arange(TEXT) < torch.tensor([[3, 6, 1], [2, 4, 5]])[:, :videos, None]).long()
    cond, uncond = (
        {"encoder_hidden_states": normal(videos, TEXT, 16), "encoder_attention_mask": mask} for mask in masks
    )
    return shared, cond, uncond


def values(attention, hidden_states, **_):
    """STG-A: the attention map is the identity, arXiv 2411.18664 Eq. 17; linear attention has a map, too."""
    return attention.to_out[0](attention.to_v(hidden_states))


def skipped(transformer, skip):
    blocks = [transformer.transformer_blocks[layer] for layer in skip.layers]
    if skip.mode == "residual":
        return block_inputs_returned(blocks, ("hidden_states",))
    return replaced_forwards([block.attn1 for block in blocks], values)


CASES = [
    Case("Sana-Video", partial(model, qk_norm=None), partial(inputs, timestep=(TOKENS,)), skipped),
    Case(
        "Sana-Video, distilled",
        partial(model, guidance_embeds=True),
        partial(inputs, guidance=torch.tensor([4.0, 6.0, 1.0])),
        skipped,
    ),
]
