"""HunyuanVideo-1.5: text-to-video, and image-to-video with the second timestep of MeanFlow models."""

from contextlib import contextmanager
from functools import partial

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from models.case import Case, attention_with, block_inputs_returned, randomise, replaced_forwards
from models.families.hunyuan_video import rotated

TEXT, TEXT_2, IMAGE = 6, 4, 3


def model(dtype, **config):
    torch.manual_seed(0)
    return randomise(
        HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=4,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            **config,
        )
    ).to(dtype)


def inputs(videos, dtype, image=False):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def masks(tokens, lengths):
        return torch.arange(tokens) < torch.tensor(lengths)[:, :videos, None]

    timesteps = torch.tensor([700.0, 400.0, 100.0], dtype=dtype)[:videos]
    shared = {
        "hidden_states": normal(videos, 9, 2, 4, 4),
        "timestep": timesteps,
        "image_embeds": normal(videos, IMAGE, 12) * image,
    }
    if image:
        shared["timestep_r"] = timesteps / 2
    cond, uncond = (
        {
            "encoder_hidden_states": normal(videos, TEXT, 16),
            "encoder_attention_mask": mask.to(dtype),  # the pipelines cast it
            "encoder_hidden_states_2": normal(videos, TEXT_2, 8),
            "encoder_attention_mask_2": mask_2.to(dtype),
        }
        for mask, mask_2 in zip(masks(TEXT, [[3, 6, 1], [2, 4, 5]]), masks(TEXT_2, [[2, 0, 4], [0, 0, 0]]), strict=True)
    )
    return shared, cond, uncond


def stg_a(attention, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
    """A video token sees its own key and the valid text's, valid text sees all; padding sees nothing."""
    size = hidden_states.shape[1]

    def joint(to, to_text, norm=None, text_norm=None):
        video = to(hidden_states).unflatten(2, (attention.heads, -1))
        text = to_text(encoder_hidden_states).unflatten(2, (attention.heads, -1))
        if norm is not None:
            video, text = rotated(norm(video), *image_rotary_emb), text_norm(text)
        return torch.cat([video, text], 1).transpose(1, 2)

    q = joint(attention.to_q, attention.add_q_proj, attention.norm_q, attention.norm_added_q)
    k = joint(attention.to_k, attention.add_k_proj, attention.norm_k, attention.norm_added_k)
    v = joint(attention.to_v, attention.add_v_proj)
    valid = torch.cat([torch.ones(len(hidden_states), size, dtype=torch.bool), attention_mask], 1)
    mask = valid[:, None, None] & valid[:, None, :, None]
    mask[..., :size, :size] &= torch.eye(size, dtype=torch.bool)
    out = attention_with(mask, q, k, v).transpose(1, 2).flatten(2)
    return attention.to_out[0](out[:, :size]), attention.to_add_out(out[:, size:])


@contextmanager
def skipped(transformer, skip):
    blocks = [transformer.transformer_blocks[layer] for layer in skip.layers]
    if skip.mode == "residual":
        with block_inputs_returned(blocks, ("hidden_states", "encoder_hidden_states")):
            yield
    else:
        with replaced_forwards([block.attn for block in blocks], stg_a):
            yield


CASES = [
    Case("HunyuanVideo-1.5", model, inputs, skipped, bitwise=("residual",)),
    Case(
        "HunyuanVideo-1.5-image",
        partial(model, use_meanflow=True),
        partial(inputs, image=True),
        skipped,
        bitwise=("residual",),
    ),
]
