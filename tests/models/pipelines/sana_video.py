"""Sana-Video."""

import torch
from diffusers import DPMSolverMultistepScheduler, SanaVideoPipeline
from models.families import sana_video
from models.pipeline_case import PipelineCase
from models.text import tiny_t5


def build():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    transformer = sana_video.model(torch.float32, caption_channels=32)
    pipe = SanaVideoPipeline(scheduler=scheduler, vae=None, transformer=transformer, **tiny_t5())
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL = {
    "height": 32,
    "width": 32,
    "frames": 5,
    "num_inference_steps": 3,
    "guidance_scale": 6.0,
    "max_sequence_length": 16,
    "complex_human_instruction": None,
    "use_resolution_binning": False,
}
CASES = [PipelineCase("SanaVideoPipeline", build, sana_video.CASES[0], CALL)]
