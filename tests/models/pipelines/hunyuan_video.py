"""HunyuanVideo: CFG beside the distilled guidance, with a negative prompt of another length."""

from functools import partial

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
)
from models.families import hunyuan_video
from models.pipeline_case import PipelineCase
from PIL import Image

PICTURES = [Image.fromarray(pixels) for pixels in np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)]
TEXT_ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def build(kind, without=TEXT_ENCODERS, **config):
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    pipe = kind(
        transformer=hunyuan_video.model(torch.float32, **config),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **dict.fromkeys(without),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(videos, negative_tokens=hunyuan_video.TEXT, pictures=()):
    """Embeddings [B, T, 16] and [B, 8]: the pipelines take them instead of text."""
    generator = torch.Generator().manual_seed(2)
    arguments = {"image": list(pictures[:videos])} if pictures else {}
    for prefix, tokens, lengths in (("", hunyuan_video.TEXT, [3, 6]), ("negative_", negative_tokens, [5, 2])):
        arguments[f"{prefix}prompt_embeds"] = torch.randn(videos, tokens, 16, generator=generator)
        arguments[f"{prefix}pooled_prompt_embeds"] = torch.randn(videos, 8, generator=generator)
        mask = torch.arange(tokens) < torch.tensor(lengths[:videos])[:, None]
        arguments[f"{prefix}prompt_attention_mask"] = mask.to(torch.int64)
    return arguments


CALL = {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 3, "true_cfg_scale": 3.0}


def case(name, kind, family, model, without=TEXT_ENCODERS, **options):
    return PipelineCase(
        name,
        partial(build, kind, without, **model),
        family,
        CALL,
        plain={"true_cfg_scale": 1.0},
        sequential=True,
        prompts=partial(prompts, **options),
    )


TEXT_TO_VIDEO, CONCAT, REPLACE = hunyuan_video.CASES
IMAGE_TO_VIDEO = (*TEXT_ENCODERS, "image_processor")
CASES = [
    case("HunyuanVideoPipeline", HunyuanVideoPipeline, TEXT_TO_VIDEO, {}),
    case("HunyuanVideoPipeline-unequal", HunyuanVideoPipeline, TEXT_TO_VIDEO, {}, negative_tokens=9),
    case(
        "HunyuanVideoImageToVideoPipeline",
        HunyuanVideoImageToVideoPipeline,
        REPLACE,
        hunyuan_video.REPLACE,
        IMAGE_TO_VIDEO,
        pictures=PICTURES,
    ),
    case(
        "HunyuanVideoImageToVideoPipeline-latent_concat",
        HunyuanVideoImageToVideoPipeline,
        CONCAT,
        hunyuan_video.CONCAT,
        IMAGE_TO_VIDEO,
        pictures=PICTURES,
    ),
    case(
        "HunyuanSkyreelsImageToVideoPipeline",
        HunyuanSkyreelsImageToVideoPipeline,
        TEXT_TO_VIDEO,
        {"in_channels": 8},
        pictures=PICTURES,
    ),
]
