"""Latte."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline
from models.families import latte
from models.pipeline_case import PipelineCase
from models.text import tiny_t5


def build(dtype=torch.float32):
    torch.manual_seed(0)
    transformer = latte.model(dtype, caption_channels=32)
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    pipe = LattePipeline(scheduler=DDIMScheduler(clip_sample=False), vae=vae, transformer=transformer, **tiny_t5()).to(
        dtype
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL = {
    "height": 8,
    "width": 8,
    "video_length": 3,
    "num_inference_steps": 3,
    "guidance_scale": 7.5,
    "clean_caption": False,
}
CASES = [PipelineCase("LattePipeline", build, latte.CASES[0], CALL)]
