"""Mochi."""

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline
from models.families import mochi
from models.pipeline_case import PipelineCase
from models.text import tiny_t5


def build():
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    transformer = mochi.model(torch.float32, in_channels=12, text_embed_dim=32)
    pipe = MochiPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **tiny_t5())
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL = {
    "height": 16,
    "width": 16,
    "num_frames": 7,
    "num_inference_steps": 3,
    "guidance_scale": 4.5,
    "max_sequence_length": 16,
}
CASES = [PipelineCase("MochiPipeline", build, mochi.CASES[0], CALL)]
