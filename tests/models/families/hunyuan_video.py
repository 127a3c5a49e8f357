"""HunyuanVideo: guidance-embedded text-to-video, and both image-to-video variants."""

from contextlib import contextmanager
from functools import partial

import torch
from diffusers import HunyuanVideoTransformer3DModel
from models.case import Case, attention_with, block_inputs_returned, randomise, replaced_forwards

TEXT = 6


def model(dtype, **config):
    torch.manual_seed(0)
    return randomise(
        HunyuanVideoTransformer3DModel(
            **{
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 10,
                "num_layers": 2,
                "num_single_layers": 2,
                "num_refiner_layers": 1,
                "patch_size": 1,
                "patch_size_t": 1,
                "text_embed_dim": 16,
                "pooled_projection_dim": 8,
                "rope_axes_dim": (2, 4, 4),
                **config,
            }
        )
    ).to(dtype)


def inputs(videos, dtype, channels=4, guided=True):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    lengths = torch.tensor([[3, 6, 1], [2, 4, 5]])[:, :videos]
    masks = torch.arange(TEXT) < lengths[..., None]
    shared = {"hidden_states": normal(videos, channels, 2, 4, 4), "timestep": torch.tensor([700.0] * videos)}
    if guided:
        shared["guidance"] = torch.tensor([6000.0, 4000.0, 1000.0], dtype=dtype)[:videos]
    cond, uncond = (
        {
            "encoder_hidden_states": normal(videos, TEXT, 16),
            "encoder_attention_mask": mask.to(dtype),  # the pipelines cast it
            "pooled_projections": normal(videos, 8),
        }
        for mask in masks
    )
    return shared, cond, uncond


def rotated(x, cos, sin):
    """[R, S, N, D], pairs of neighbours turned; diffusers' tables have every entry twice."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(turned * torch.complex(cos, sin)[:, None, ::2]).flatten(-2).to(x.dtype)


def stg_a(attention, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
    """A video token sees its own key and the prompt's, the prompt sees all, as in the first STGuidance release."""
    size, keys = hidden_states.shape[1], attention_mask.reshape(len(hidden_states), -1)
    shares_weights = attention.add_q_proj is None

    def joint(video_name, text_name, norm=None, text_norm=None):
        to, to_text = getattr(attention, video_name), getattr(attention, video_name if shares_weights else text_name)
        video, text = (
            f(x).unflatten(2, (attention.heads, -1)) for f, x in ((to, hidden_states), (to_text, encoder_hidden_states))
        )
        if norm is not None:
            video = rotated(norm(video), *image_rotary_emb)
            text = (norm if shares_weights else text_norm)(text)
        return torch.cat([video, text], 1).transpose(1, 2)

    q = joint("to_q", "add_q_proj", attention.norm_q, getattr(attention, "norm_added_q", None))
    k = joint("to_k", "add_k_proj", attention.norm_k, getattr(attention, "norm_added_k", None))
    v = joint("to_v", "add_v_proj")
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    mask[:size, :size] = torch.eye(size, dtype=torch.bool)
    out = attention_with(mask & keys.bool()[:, None, None], q, k, v).transpose(1, 2).flatten(2)
    video, text = out[:, :size], out[:, size:]
    return (video, text) if shares_weights else (attention.to_out[0](video), attention.to_add_out(text))


@contextmanager
def skipped(transformer, skip):
    layers = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    blocks = [layers[layer] for layer in skip.layers]
    if skip.mode == "residual":
        with block_inputs_returned(blocks, ("hidden_states", "encoder_hidden_states")):
            yield
    else:
        with replaced_forwards([block.attn for block in blocks], stg_a):
            yield


CONCAT = {"in_channels": 9, "image_condition_type": "latent_concat", "guidance_embeds": False}
REPLACE = {"image_condition_type": "token_replace"}
CASES = [
    Case("HunyuanVideo", model, inputs, skipped, bitwise=("residual",)),
    Case(
        "HunyuanVideo-latent_concat",
        partial(model, **CONCAT),
        partial(inputs, channels=9, guided=False),
        skipped,
        bitwise=("residual",),
    ),
    Case("HunyuanVideo-token_replace", partial(model, **REPLACE), inputs, skipped, bitwise=("residual",)),
]
