"""LTX-2 (caption projection, interleaved RoPE, no gates) and LTX-2.3 (gates, modulated text, split RoPE)."""

from contextlib import ExitStack, contextmanager

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import LTX2PerturbedAttnProcessor
from models.case import Case, block_inputs_returned, randomise

FRAMES, HEIGHT, WIDTH, AUDIO_FRAMES, TEXT = 2, 3, 2, 5, 6
VARIANTS = {
    "LTX-2": {"caption_channels": 12},
    "LTX-2.3": {
        "gated_attn": True,
        "audio_gated_attn": True,
        "cross_attn_mod": True,
        "audio_cross_attn_mod": True,
        "perturbed_attn": True,
        "use_prompt_embeddings": False,
        "rope_type": "split",
    },
}


def model(variant, dtype, num_layers=4, **changes):
    torch.manual_seed(0)
    return randomise(
        LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=num_layers,
            **{**VARIANTS[variant], **changes},
        )
    ).to(dtype)


def inputs(variant, videos, dtype, tokens_have_timesteps=False):
    """One noise level per video for the picture and another for the sound; a first frame without noise as in I2V."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    size = FRAMES * HEIGHT * WIDTH
    sigma = torch.tensor([700.0, 420.0, 150.0])[:videos]
    shared = {
        "hidden_states": normal(videos, size, 4),
        "audio_hidden_states": normal(videos, AUDIO_FRAMES, 4),
        "timestep": sigma,
        "audio_timestep": sigma - 50,
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "audio_num_frames": AUDIO_FRAMES,
    }
    if tokens_have_timesteps:
        is_noisy = torch.arange(size) >= HEIGHT * WIDTH
        shared["timestep"] = sigma[:, None] * is_noisy
    widths = (12, 12) if variant == "LTX-2" else (16, 8)
    if variant == "LTX-2.3":
        starts = torch.rand(videos, 4, size, generator=generator)
        coords = torch.stack([starts, starts + 0.1], dim=-1)
        shared |= {"sigma": sigma, "audio_sigma": sigma - 50, "use_cross_timestep": True}
        shared |= {"video_coords": coords[:, :3], "audio_coords": coords[:, 3:, :AUDIO_FRAMES]}
    lengths = torch.tensor([[3, 6, 1], [2, 4, 5]])[:, :videos]
    cond, uncond = (
        {
            "encoder_hidden_states": normal(videos, TEXT, widths[0]),
            "audio_encoder_hidden_states": normal(videos, TEXT, widths[1]),
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask,
        }
        for mask in (torch.arange(TEXT) < lengths[..., None]).long()
    )
    return shared, cond, uncond


class Perturbed(LTX2PerturbedAttnProcessor):
    """diffusers' processor as it runs in a pass of which every row is perturbed."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **{**kwargs, "perturbation_mask": None, "all_perturbed": True})


@contextmanager
def skipped(transformer, skip):
    blocks = [transformer.transformer_blocks[layer] for layer in skip.layers]
    with ExitStack() as stack:
        if skip.mode == "residual":
            stack.enter_context(block_inputs_returned(blocks, ("hidden_states", "audio_hidden_states")))
        else:
            for attention in (module for block in blocks for module in (block.attn1, block.audio_attn1)):
                stack.callback(attention.set_processor, attention.processor)
                attention.set_processor(Perturbed())
        yield


def case(variant, name, tokens_have_timesteps=False):
    return Case(
        name,
        lambda dtype: model(variant, dtype),
        lambda videos, dtype: inputs(variant, videos, dtype, tokens_have_timesteps),
        skipped,
    )


CASES = [
    case("LTX-2", "LTX-2"),
    case("LTX-2.3", "LTX-2.3"),
    case("LTX-2.3", "LTX-2.3-image", tokens_have_timesteps=True),
]
