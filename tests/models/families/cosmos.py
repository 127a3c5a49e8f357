"""Cosmos 1.0: learned positions, a mask of the prompt. Cosmos 2.0: given frames with a timestep of their own."""

from functools import partial

import torch
from diffusers import CosmosTransformer3DModel
from models.case import Case, block_inputs_returned, randomise, replaced_forwards

CHANNELS, FRAMES, SIZE, TEXT = 4, 2, 8, 6


def model(dtype, in_channels=CHANNELS, **config):
    torch.manual_seed(0)
    return randomise(
        CosmosTransformer3DModel(
            in_channels=in_channels,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=4,
            mlp_ratio=2,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(4, 8, 8),
            concat_padding_mask=False,
            **config,
        ),
        scale=0.1,
    ).to(dtype)


def inputs(videos, dtype):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    shared = {
        "hidden_states": normal(videos, CHANNELS, FRAMES, SIZE, SIZE),
        "timestep": torch.tensor([0.7, 0.65, 0.3])[:videos],
        "fps": 24,
    }
    masks = torch.arange(TEXT) < torch.tensor([[3, 6, 1], [2, 4, 5]])[:, :videos, None]
    cond, uncond = ({"encoder_hidden_states": normal(videos, TEXT, 16), "attention_mask": mask} for mask in masks)
    return shared, cond, uncond


def given_frame(videos, dtype):
    """Cosmos 2.0, video to world: the first frame is given, and there is no mask."""
    shared, cond, uncond = inputs(videos, dtype)
    is_given = torch.zeros(videos, 1, FRAMES, SIZE, SIZE, dtype=dtype)
    is_given[:, :, 0] = 1
    times = torch.stack([torch.full((videos,), 0.01), shared["timestep"]], dim=1)
    shared |= {"condition_mask": is_given, "timestep": times[:, None, :, None, None]}
    return shared, *({"encoder_hidden_states": prompt["encoder_hidden_states"]} for prompt in (cond, uncond))


def values(attention, hidden_states, **_):
    """STG-A: the attention map is the identity, arXiv 2411.18664 Eq. 17."""
    return attention.to_out[0](attention.to_v(hidden_states))


def skipped(transformer, skip):
    blocks = [transformer.transformer_blocks[layer] for layer in skip.layers]
    if skip.mode == "residual":
        return block_inputs_returned(blocks, ("hidden_states",))
    return replaced_forwards([block.attn1 for block in blocks], values)


CROSS = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 16, "encoder_hidden_states_channels": 16}
COSMOS_2 = partial(model, in_channels=CHANNELS + 1, extra_pos_embed_type=None, **CROSS)

CASES = [
    Case("Cosmos 1.0", model, inputs, skipped),
    Case("Cosmos 2.0", COSMOS_2, given_frame, skipped),
]
