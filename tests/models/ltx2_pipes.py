"""Tiny LTX-2 pipelines that start from prompt embeddings."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from models.families import ltx2
from torch import Tensor

KINDS = {"text": LTX2Pipeline, "image": LTX2ImageToVideoPipeline, "condition": LTX2ConditionPipeline}
TEXT, WIDTH, STATES = 6, 16, 3  # tokens, channels and hidden states of the text encoder


def build(kind: str, variant: str, **changes: Any) -> Any:
    """A pipeline of `kind` on the family's tiny model, without a text encoder."""
    changes = {"caption_channels": WIDTH} | changes if variant == "LTX-2" else changes
    transformer = ltx2.model(variant, torch.float32, **changes)
    torch.manual_seed(1)
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=STATES,
        **{f"{name}_connector_num_attention_heads": 2 for name in ("video", "audio")},
        video_connector_attention_head_dim=8,
        audio_connector_attention_head_dim=4 if variant == "LTX-2.3" else 8,
        **{f"{name}_connector_num_layers": 1 for name in ("video", "audio")},
        **{f"{name}_connector_num_learnable_registers": None for name in ("video", "audio")},
        connector_rope_base_seq_len=32,
        rope_type="split",
        per_modality_projections=variant == "LTX-2.3",
        video_hidden_dim=16,
        audio_hidden_dim=8,
    ).eval()
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
    ).eval()
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    ).eval()
    pipe = KINDS[kind](
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=None,
        tokenizer=None,
        connectors=connectors,
        transformer=transformer,
        vocoder=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, videos: int = 1, **changes: Any) -> tuple[Tensor, Tensor]:
    """Final latents (video, audio) of a call of three steps with fixed prompts, pictures and noise."""
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(2, 2, TEXT, WIDTH * STATES, generator=generator)[:, :videos]
    masks = (torch.arange(TEXT) >= torch.tensor([[3, 0], [1, 2]])[..., None]).long()[:, :videos]
    image = torch.rand(1, 3, 32, 32, generator=generator)
    arguments = {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "prompt_attention_mask": masks[0],
        "negative_prompt_attention_mask": masks[1],
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "frame_rate": 25.0,
        "num_inference_steps": 3,
        "stg_scale": 1.0,
        "audio_stg_scale": 0.5,
        "spatio_temporal_guidance_blocks": [2],
        "generator": [torch.Generator().manual_seed(i) for i in range(videos)],
    }
    if isinstance(pipe, LTX2ImageToVideoPipeline):
        arguments |= {"image": image.expand(videos, -1, -1, -1), "image_crf": 0}
    if isinstance(pipe, LTX2ConditionPipeline):
        arguments |= {"conditions": [LTX2VideoCondition(frames=image, index=0, strength=0.8, crf=0)]}
    return pipe(**{**arguments, **changes}, output_type="latent", return_dict=False)
