"""Allegro."""

import torch
from diffusers import AllegroPipeline, EulerAncestralDiscreteScheduler
from models.families import allegro
from models.pipeline_case import PipelineCase
from models.text import tiny_t5


def build(dtype=torch.float32):
    transformer = allegro.model(dtype, caption_channels=32)
    pipe = AllegroPipeline(
        scheduler=EulerAncestralDiscreteScheduler(), vae=None, transformer=transformer, **tiny_t5()
    ).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 8,
    "num_inference_steps": 3,
    "guidance_scale": 7.5,
    "clean_caption": False,
    "max_sequence_length": 16,
}
CASES = [PipelineCase("AllegroPipeline", build, allegro.CASES[0], CALL)]
