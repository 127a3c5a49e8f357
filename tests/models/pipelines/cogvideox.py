"""CogVideoX: text, image, video and control video to video."""

from functools import partial

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)
from models.families import cogvideox
from models.pipeline_case import PipelineCase
from models.text import tiny_t5
from PIL import Image


def build(kind, variant, scheduler, in_channels=4):
    """32 x 32 pixels and 9 frames are 4 x 4 x 3 latents."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    transformer = cogvideox.model(
        variant,
        torch.float32,
        in_channels=in_channels,
        text_embed_dim=32,
        max_text_seq_length=16,
        sample_height=4,
        sample_width=4,
        sample_frames=9,
    )
    # As in the released scheduler configs.
    steps = scheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0
    )
    pipe = kind(vae=vae, transformer=transformer, scheduler=steps, **tiny_t5())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(videos, **others):
    each = {"prompt": ["a red cat", "dogs in the snow"], "negative_prompt": ["blurred", "bad"], **others}
    return {name: values[:videos] for name, values in each.items()}


CALL = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0, "max_sequence_length": 16}
_random = np.random.default_rng(0)
IMAGES = [Image.fromarray(_random.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(9)]
CLIPS = [IMAGES, IMAGES[::-1]]


def case(kind, variant, scheduler, in_channels=4, others=None, **call):
    """`others`: arguments with an entry per video."""
    family = next(family for family in cogvideox.CASES if family.name == variant)
    pipe = partial(build, kind, variant, scheduler, in_channels)
    return PipelineCase(kind.__name__, pipe, family, {**CALL, **call}, prompts=partial(prompts, **others or {}))


CASES = [
    case(CogVideoXPipeline, "CogVideoX-2B", CogVideoXDDIMScheduler, num_frames=9),
    case(
        CogVideoXImageToVideoPipeline,
        "CogVideoX-1.5-I2V",
        CogVideoXDPMScheduler,
        in_channels=8,
        others={"image": IMAGES},
        num_frames=9,
    ),
    case(CogVideoXVideoToVideoPipeline, "CogVideoX-5B", CogVideoXDPMScheduler, others={"video": CLIPS}, strength=1.0),
    case(
        CogVideoXFunControlPipeline,
        "CogVideoX-5B-I2V",
        CogVideoXDDIMScheduler,
        in_channels=8,
        others={"control_video": CLIPS},
    ),
]
