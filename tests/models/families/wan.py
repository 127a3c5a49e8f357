"""Wan: text and image to video, a timestep per token (2.2 TI2V), and SkyReels-V2, where frames have timesteps."""

from functools import partial

import torch
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel
from models.case import Case, block_inputs_returned, randomise, replaced_forwards

TEXT = 512  # the processor takes what stands in front of so many tokens for the image
FRAMES, SIZE, CHANNELS = 2, 4, 4
IMAGE = {"image_dim": 8, "added_kv_proj_dim": 24}


def model(dtype, kind=WanTransformer3DModel, num_layers=4, seed=0, **config):
    torch.manual_seed(0)
    tiny = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": num_layers,
        "rope_max_seq_len": 32,
    }
    return as_loaded(randomise(kind(**{**tiny, **config}), seed), dtype)


def as_loaded(transformer, dtype):
    """With the weights in float32 that `from_pretrained(torch_dtype=dtype)` leaves there."""
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return transformer


def inputs(videos, dtype, frames=FRAMES, timestep=(), image_tokens=0, images=1, text=6, **call):
    """Timesteps of shape [videos, *timestep]; `images` of `image_tokens` tokens each."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    times = torch.tensor([700, 650, 300])[:videos].view(-1, *[1] * len(timestep)).repeat(1, *timestep)
    if timestep:
        times[:, : timestep[0] // 2] = 0  # frames that are given
    shared = {"hidden_states": normal(videos, CHANNELS, frames, SIZE, SIZE), "timestep": times, **call}
    image = normal(videos * images, image_tokens, 8)
    prompts = [{"encoder_hidden_states": normal(videos, text, 16)} for _ in range(2)]
    if image_tokens:
        prompts = [{**prompt, "encoder_hidden_states_image": image} for prompt in prompts]
    return shared, *prompts


def values(attention, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
    """P1: each token attends to itself alone."""
    return attention.to_out[0](attention.to_v(hidden_states))


def skipped(transformer, skip):
    blocks = [transformer.blocks[layer] for layer in skip.layers]
    if skip.mode == "residual":
        return block_inputs_returned(blocks, ("hidden_states",))
    return replaced_forwards([block.attn1 for block in blocks], values)


SKYREELS = partial(model, kind=SkyReelsV2Transformer3DModel)
TOKENS = FRAMES * (SIZE // 2) ** 2
WITH_IMAGE = partial(inputs, text=TEXT, image_tokens=5)
FORCED = partial(inputs, frames=4, timestep=(4,), enable_diffusion_forcing=True, fps=[1])

CASES = [
    Case("Wan T2V", model, inputs, skipped),
    Case("Wan I2V", partial(model, **IMAGE), WITH_IMAGE, skipped),
    Case("Wan FLF2V", partial(model, **IMAGE, pos_embed_seq_len=10), partial(WITH_IMAGE, images=2), skipped),
    Case("Wan TI2V", model, partial(inputs, timestep=(TOKENS,)), skipped),
    Case("SkyReels-V2 T2V", SKYREELS, inputs, skipped),
    Case("SkyReels-V2 I2V", partial(SKYREELS, **IMAGE), WITH_IMAGE, skipped),
    Case("SkyReels-V2 DF", partial(SKYREELS, num_frame_per_block=2, inject_sample_info=True), FORCED, skipped),
]
