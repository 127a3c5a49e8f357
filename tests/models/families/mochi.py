"""Mochi."""

from contextlib import contextmanager

import torch
from diffusers import MochiTransformer3DModel
from models.case import Case, attention_with, block_inputs_returned, randomise, replaced_forwards

TEXT = 6


def model(dtype, num_layers=4, in_channels=4, text_embed_dim=16):
    torch.manual_seed(0)
    return randomise(
        MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=num_layers,
            pooled_projection_dim=16,
            in_channels=in_channels,
            text_embed_dim=text_embed_dim,
            time_embed_dim=4,
            max_sequence_length=16,
        )
    ).to(dtype)


def inputs(videos, dtype):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    lengths = torch.tensor([[3, 6, 1], [2, 4, 5]])[:, :videos]
    masks = torch.arange(TEXT) < lengths[..., None]
    shared = {"hidden_states": normal(videos, 4, 2, 8, 8), "timestep": torch.tensor([700] * videos)}
    cond, uncond = (
        {"encoder_hidden_states": normal(videos, TEXT, 16), "encoder_attention_mask": mask} for mask in masks
    )
    return shared, cond, uncond


def rotated(x, cos, sin):
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def stg_a(attention, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
    """One row; a video token sees its own key and the prompt's, as the mask of the first STGuidance release says."""
    size, count = hidden_states.shape[1], int(attention_mask.sum())
    text = encoder_hidden_states[:, :count]

    def heads(x):
        return x.unflatten(2, (attention.heads, -1))

    q = rotated(attention.norm_q(heads(attention.to_q(hidden_states))), *image_rotary_emb)
    k = rotated(attention.norm_k(heads(attention.to_k(hidden_states))), *image_rotary_emb)
    v = heads(attention.to_v(hidden_states))
    q = torch.cat([q, attention.norm_added_q(heads(attention.add_q_proj(text)))], 1)
    k = torch.cat([k, attention.norm_added_k(heads(attention.add_k_proj(text)))], 1)
    v = torch.cat([v, heads(attention.add_v_proj(text))], 1)
    mask = torch.ones(size + count, size + count, dtype=torch.bool)
    mask[:size, :size] = torch.eye(size, dtype=torch.bool)
    out = attention_with(mask, *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)
    padding = encoder_hidden_states.shape[1] - count
    out_text = torch.nn.functional.pad(out[:, size:], (0, 0, 0, padding))
    if hasattr(attention, "to_add_out"):
        out_text = attention.to_add_out(out_text)
    return attention.to_out[0](out[:, :size]), out_text


def row_by_row(attention, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
    rows = zip(hidden_states.split(1), encoder_hidden_states.split(1), attention_mask.split(1), strict=True)
    results = [stg_a(attention, *row, image_rotary_emb) for row in rows]
    return tuple(map(torch.cat, zip(*results, strict=True)))


@contextmanager
def skipped(transformer, skip):
    blocks = [transformer.transformer_blocks[layer] for layer in skip.layers]
    if skip.mode == "residual":
        with block_inputs_returned(blocks, ("hidden_states", "encoder_hidden_states")):
            yield
    else:
        with replaced_forwards([block.attn1 for block in blocks], row_by_row):
            yield


CASES = [Case("Mochi", model, inputs, skipped, bitwise=("residual",))]
