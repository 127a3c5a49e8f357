"""HunyuanVideo-1.5's pipelines take STG as a guider: against a loop of single calls."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, FlowMatchEulerDiscreteScheduler, HunyuanVideo15Pipeline
from models.case import relative_error
from models.families import hunyuan_video_1_5 as family

from stg_engine import Skip, STGConfig, STGGuidance

CASE = family.CASES[0]
CONFIG = STGConfig(layers=(1, 3), scale=1.5)
EMBEDDINGS = {
    "prompt_embeds": "encoder_hidden_states",
    "prompt_embeds_mask": "encoder_attention_mask",
    "prompt_embeds_2": "encoder_hidden_states_2",
    "prompt_embeds_mask_2": "encoder_attention_mask_2",
}


def build(guider):
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()
    pipe = HunyuanVideo15Pipeline(
        transformer=family.model(torch.float32),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=guider,
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_loop(pipe, cond, uncond, guidance_scale, mode):
    """Two or three calls a step, Euler; a text-to-video model gets no image and no frames to go on from."""
    videos, model = len(cond["encoder_hidden_states"]), pipe.transformer
    generators = [torch.Generator().manual_seed(i) for i in range(videos)]
    latents = pipe.prepare_latents(videos, 4, 16, 16, 5, torch.float32, torch.device("cpu"), generators)
    image = torch.zeros(videos, pipe.vision_num_semantic_tokens, 12)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 4)[:-1])
    for t in pipe.scheduler.timesteps:

        def call(prompt, latents=latents, t=t):
            frames = torch.cat([latents, torch.zeros(videos, 5, *latents.shape[2:])], 1)
            return model(frames, t.expand(videos), image_embeds=image, **prompt, return_dict=False)[0]

        c = guided = call(cond)
        if guidance_scale > 1:
            u = call(uncond)
            guided = u + guidance_scale * (c - u)
        with CASE.skipped(model, Skip(CONFIG.layers, mode=mode)):
            guided = guided + CONFIG.scale * (c - call(cond))
        latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("mode", ["residual", "attention"])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0], ids=["cfg", "no_cfg"])
@torch.no_grad()
def test_latents_equal_those_of_single_calls(guidance_scale, mode, videos):
    guider = STGGuidance(guidance_scale, STGConfig(layers=CONFIG.layers, scale=CONFIG.scale, mode=mode))
    pipe = build(guider)
    _, cond, uncond = CASE.inputs(videos, torch.float32)
    expected = own_loop(pipe, cond, uncond, guidance_scale, mode)
    prompts = {name: cond[argument] for name, argument in EMBEDDINGS.items()}
    prompts |= {f"negative_{name}": uncond[argument] for name, argument in EMBEDDINGS.items()}
    actual = pipe(
        height=16,
        width=16,
        num_frames=5,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(i) for i in range(videos)],
        output_type="latent",
        return_dict=False,
        **prompts,
    )[0]
    guider.detach()
    assert relative_error(actual, expected) <= 2e-5
