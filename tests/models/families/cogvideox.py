"""CogVideoX: 2B (sinusoidal positions), 5B (RoPE), 5B I2V (RoPE and learned positions), 1.5 I2V (patches in time)."""

from contextlib import contextmanager
from functools import partial

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from models.case import Case, attention_with, block_inputs_returned, randomise, replaced_forwards

TEXT, FRAMES, SIDE = 5, 4, 8  # latents of SIDE x SIDE, patches of 2 x 2
VARIANTS = {
    "CogVideoX-2B": {"num_attention_heads": 2, "attention_head_dim": 8, "sample_height": 6},  # not SIDE: made anew
    "CogVideoX-5B": {"use_rotary_positional_embeddings": True},
    "CogVideoX-5B-I2V": {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True},
    "CogVideoX-1.5-I2V": {
        "use_rotary_positional_embeddings": True,
        "patch_size_t": 2,
        "patch_bias": False,
        "ofs_embed_dim": 6,
    },
}


def model(variant, dtype, **changes):
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 6,
        "text_embed_dim": 8,
        "max_text_seq_length": TEXT,
        "sample_width": SIDE,
        "sample_height": SIDE,
        "sample_frames": (FRAMES - 1) * 4 + 1,
        **VARIANTS[variant],
        **changes,
    }
    return randomise(CogVideoXTransformer3DModel(**config)).to(dtype)


def inputs(variant, videos, dtype):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    config = VARIANTS[variant]
    shared = {"hidden_states": normal(videos, FRAMES, 4, SIDE, SIDE), "timestep": torch.tensor([700, 20, 400])[:videos]}
    if config.get("use_rotary_positional_embeddings"):
        side, frames = SIDE // 2, FRAMES // config.get("patch_size_t", 1)
        shared["image_rotary_emb"] = get_3d_rotary_pos_embed(16, ((0, 0), (side, side)), (side, side), frames)
    if "ofs_embed_dim" in config:
        shared["ofs"] = torch.full((1,), 2.0, dtype=dtype)
    cond, uncond = ({"encoder_hidden_states": normal(videos, TEXT, 8)} for _ in range(2))
    return shared, cond, uncond


def rotated(x, cos, sin):
    """[R, N, S, D]: pairs of channels as complex numbers, turned by the angles that cos and sin hold twice."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.complex(cos[:, ::2], sin[:, ::2])
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def stg_a(attention, hidden_states, encoder_hidden_states, image_rotary_emb=None):
    """Every video token sees its own key and the prompt's, prompt tokens see all keys; the prompt stands first."""
    size, text = hidden_states.shape[1], encoder_hidden_states.shape[1]

    def projected(to, norm=None):
        streams = []
        for stream in (encoder_hidden_states, hidden_states):
            x = to(stream).unflatten(2, (attention.heads, -1)).transpose(1, 2)
            streams.append(x if norm is None else norm(x))
        if norm is not None and image_rotary_emb is not None:
            streams[1] = rotated(streams[1], *image_rotary_emb)
        return torch.cat(streams, dim=2)

    mask = torch.ones(text + size, text + size, dtype=torch.bool)
    mask[text:, text:] = torch.eye(size, dtype=torch.bool)
    q, k = projected(attention.to_q, attention.norm_q), projected(attention.to_k, attention.norm_k)
    out = attention.to_out[0](attention_with(mask, q, k, projected(attention.to_v)).transpose(1, 2).flatten(2))
    return out[:, text:], out[:, :text]


@contextmanager
def skipped(transformer, skip):
    blocks = [transformer.transformer_blocks[layer] for layer in skip.layers]
    if skip.mode == "residual":
        with block_inputs_returned(blocks, ("hidden_states", "encoder_hidden_states")):
            yield
    else:
        with replaced_forwards([block.attn1 for block in blocks], stg_a):
            yield


CASES = [Case(name, partial(model, name), partial(inputs, name), skipped, bitwise=("residual",)) for name in VARIANTS]
