"""Stable Video Diffusion: an image instead of a prompt, a guidance scale per frame."""

import numpy
import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, StableVideoDiffusionPipeline
from models.families import svd
from models.pipeline_case import PipelineCase
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection


def build(dtype=torch.float32):
    unet = svd.model(dtype)
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        latent_channels=4,
        force_upcast=False,
    )
    encoder = CLIPVisionConfig(
        hidden_size=32, projection_dim=8, num_hidden_layers=1, num_attention_heads=4, image_size=224, patch_size=112
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    )
    pipe = StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=CLIPVisionModelWithProjection(encoder).eval(),
        unet=unet,
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(),
    ).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(videos):
    pixels = numpy.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=numpy.uint8)
    return {"image": [Image.fromarray(image) for image in pixels[:videos]]}


CALL = {
    "height": 16,
    "width": 16,
    "num_frames": 3,
    "num_inference_steps": 3,
    "min_guidance_scale": 1.0,
    "max_guidance_scale": 3.0,
}
CASES = [
    PipelineCase(
        "StableVideoDiffusionPipeline",
        build,
        svd.CASES[0],
        CALL,
        plain={"max_guidance_scale": 1.0},
        models=("unet",),
        prompts=images,
    )
]
