"""Wan 2.1 and 2.2, SkyReels-V2."""

from functools import partial

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from models.families import wan
from models.pipeline_case import PipelineCase
from models.text import tiny_t5
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

LATENT = 16
PARTS = {"in_channels": LATENT, "out_channels": LATENT, "text_dim": 32}


def euler():
    return FlowMatchEulerDiscreteScheduler(shift=7.0)


def unipc():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def clip():
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = CLIPVisionModel(CLIPVisionConfig(**size, image_size=32, patch_size=16)).eval()
    return {"image_encoder": encoder, "image_processor": CLIPImageProcessor(crop_size=32, size=32)}


def build(pipeline, scheduler, transformers=1, clip=dict, dtype=torch.float32, options=None, **config):
    """A tiny `pipeline`; `options` are its own, `config` is that of its transformers."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=LATENT,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    names = ("transformer", "transformer_2")[:transformers]
    models = {name: wan.model(dtype, seed=i, **{**PARTS, **config}) for i, name in enumerate(names)}
    pipe = pipeline(scheduler=scheduler(), vae=vae, **models, **clip(), **tiny_t5(), **(options or {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed):
    pixels = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


SIZE = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 4.0}
TEXT = {**SIZE, "num_frames": 9, "max_sequence_length": 16}
IMAGE = {**SIZE, "num_frames": 9, "image": picture(0)}
VIDEO = {**SIZE, "max_sequence_length": 16, "video": [picture(i) for i in range(9)], "strength": 1.0}

FORCED = {"base_num_frames": 9}
PREFIX = {**TEXT, "video": VIDEO["video"], "overlap_history": 5}

FIRST_FRAME = {"in_channels": 2 * LATENT + 4}  # noise, mask, frame
IMAGE_TOKENS = {**FIRST_FRAME, **wan.IMAGE, "clip": clip}
TWO = {"transformers": 2, "options": {"boundary_ratio": 0.9}}
PER_TOKEN = {"options": {"expand_timesteps": True}}
SKYREELS = {"kind": SkyReelsV2Transformer3DModel}


def embeddings(videos, tokens=wan.TEXT):
    """All but WanPipeline need ftfy for a prompt in words."""
    generator = torch.Generator().manual_seed(3)
    cond, uncond = torch.randn((2, 2, tokens, 32), generator=generator)
    return {"prompt_embeds": cond[:videos], "negative_prompt_embeds": uncond[:videos]}


def case(pipeline, scheduler, call, variant="", **options):
    return PipelineCase(
        name=f"{pipeline.__name__} {variant}".strip(),
        build=partial(build, pipeline, scheduler, **options),
        case=wan.CASES[0],
        call=call,
        sequential=True,
        models=("transformer", "transformer_2"),
        **({} if pipeline is WanPipeline else {"prompts": embeddings}),
    )


TWO_SCALES = {"guidance_scale_2": 2.5}
CASES = [
    case(WanPipeline, unipc, TEXT),
    case(WanPipeline, euler, {**TEXT, **TWO_SCALES}, "2.2", **TWO),
    case(WanPipeline, unipc, TEXT, "2.2 TI2V", **PER_TOKEN),
    case(WanImageToVideoPipeline, unipc, IMAGE, **IMAGE_TOKENS),
    case(
        WanImageToVideoPipeline,
        euler,
        {**IMAGE, "last_image": picture(1)},
        "FLF2V",
        **IMAGE_TOKENS,
        pos_embed_seq_len=10,
    ),
    case(WanImageToVideoPipeline, euler, {**IMAGE, **TWO_SCALES}, "2.2", **TWO, **FIRST_FRAME),
    case(WanImageToVideoPipeline, unipc, IMAGE, "2.2 TI2V", **PER_TOKEN),
    case(WanVideoToVideoPipeline, unipc, VIDEO),
    case(SkyReelsV2Pipeline, unipc, TEXT, **SKYREELS),
    case(SkyReelsV2ImageToVideoPipeline, unipc, IMAGE, **SKYREELS, **IMAGE_TOKENS),
    case(SkyReelsV2DiffusionForcingPipeline, unipc, {**TEXT, **FORCED, "prompt": None}, **SKYREELS),
    case(SkyReelsV2DiffusionForcingImageToVideoPipeline, unipc, {**IMAGE, **FORCED}, **SKYREELS),
    case(SkyReelsV2DiffusionForcingVideoToVideoPipeline, unipc, {**PREFIX, **FORCED}, **SKYREELS),
]
