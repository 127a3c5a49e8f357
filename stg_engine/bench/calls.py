"""What each family's pipeline hands its transformer in one step of one video, with random latents and prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stg_engine.bench.case import Inputs

SEED = 0
TIMESTEP = 700.0  # of 1000
AUDIO_LATENTS_PER_SECOND, FRAMES_PER_SECOND = 16000 / 160 / 4, 24.0  # LTX-2


@dataclass(frozen=True)
class Video:
    """Pixels and frames of a video; what of it a model sees depends on its VAE."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    def latents(self, spatial: int, temporal: int) -> tuple[int, int, int]:
        """Latent frames, height, width, of a causal VAE with these factors."""
        return (self.frames - 1) // temporal + 1, self.height // spatial, self.width // spatial


class Draw:
    """Tensors for a call: random ones from one seed, made on the CPU, so that they are the same on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator("cpu").manual_seed(SEED)

    def normal(self, *shape: int) -> Tensor:
        random = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return random.to(self.device, self.dtype)

    def number(self, value: float, dtype: torch.dtype) -> Tensor:
        """[1], one video's."""
        return torch.full((1,), value, dtype=dtype, device=self.device)

    def is_kept(self, tokens: int, length: int) -> Tensor:
        """A prompt's mask [1, tokens], true for its first `length` tokens."""
        return (torch.arange(tokens, device=self.device) < length)[None]


Call = Callable[[Mapping[str, Any], Video, int, Draw], tuple[Inputs, Inputs, Inputs]]
"""(the transformer's config, video, padded prompt length, draw) -> shared, cond, uncond"""


def _lengths(tokens: int) -> tuple[int, int]:
    """Of a prompt and of a negative prompt padded to `tokens`."""
    return tokens * 5 // 8, tokens // 4


def ltx(config: Mapping[str, Any], video: Video, text: int, draw: Draw) -> tuple[Inputs, Inputs, Inputs]:
    frames, height, width = video.latents(32, 8)
    shared = {
        "hidden_states": draw.normal(1, frames * height * width, config["in_channels"]),
        "timestep": draw.number(TIMESTEP, torch.float32),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }
    cond, uncond = (
        {
            "encoder_hidden_states": draw.normal(1, text, config["caption_channels"]),
            "encoder_attention_mask": draw.is_kept(text, length),
        }
        for length in _lengths(text)
    )
    return shared, cond, uncond


def ltx_2(config: Mapping[str, Any], video: Video, text: int, draw: Draw) -> tuple[Inputs, Inputs, Inputs]:
    """The connectors fill a prompt up with registers: its mask is all ones."""
    from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed

    frames, height, width = video.latents(32, 8)
    audio = round(video.frames / FRAMES_PER_SECOND * AUDIO_LATENTS_PER_SECOND)
    timestep = draw.number(TIMESTEP, torch.float32)
    rope = LTX2AudioVideoRotaryPosEmbed(dim=0)
    audio_rope = LTX2AudioVideoRotaryPosEmbed(dim=0, modality="audio", scale_factors=(config["audio_scale_factor"],))
    shared = {
        "hidden_states": draw.normal(1, frames * height * width, config["in_channels"]),
        "audio_hidden_states": draw.normal(1, audio, config["audio_in_channels"]),
        "timestep": timestep,
        "sigma": timestep,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": FRAMES_PER_SECOND,
        "audio_num_frames": audio,
        "video_coords": rope.prepare_video_coords(1, frames, height, width, draw.device, fps=FRAMES_PER_SECOND),
        "audio_coords": audio_rope.prepare_audio_coords(1, audio, draw.device),
    }
    mask = torch.ones(1, text, dtype=torch.int64, device=draw.device)
    cond, uncond = (
        {
            "encoder_hidden_states": draw.normal(1, text, config["caption_channels"]),
            "audio_encoder_hidden_states": draw.normal(1, text, config["caption_channels"]),
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask,
        }
        for _ in range(2)
    )
    return shared, cond, uncond


def mochi(config: Mapping[str, Any], video: Video, text: int, draw: Draw) -> tuple[Inputs, Inputs, Inputs]:
    shared = {
        "hidden_states": draw.normal(1, config["in_channels"], *video.latents(8, 6)),
        "timestep": draw.number(1000 - TIMESTEP, draw.dtype),
    }
    cond, uncond = (
        {
            "encoder_hidden_states": draw.normal(1, text, config["text_embed_dim"]),
            "encoder_attention_mask": draw.is_kept(text, length),
        }
        for length in _lengths(text)
    )
    return shared, cond, uncond


def cogvideox(config: Mapping[str, Any], video: Video, text: int, draw: Draw) -> tuple[Inputs, Inputs, Inputs]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, height, width = video.latents(8, 4)
    patch = config["patch_size"]
    shared: dict[str, Any] = {
        "hidden_states": draw.normal(1, frames, config["in_channels"], height, width),
        "timestep": draw.number(TIMESTEP, torch.int64),
    }
    if config["use_rotary_positional_embeddings"]:
        grid = height // patch, width // patch
        base = config["sample_width"] // patch, config["sample_height"] // patch
        shared["image_rotary_emb"] = get_3d_rotary_pos_embed(
            config["attention_head_dim"],
            get_resize_crop_region_for_grid(grid, *base),
            grid,
            frames,
            device=draw.device,
        )
    cond, uncond = ({"encoder_hidden_states": draw.normal(1, text, config["text_embed_dim"])} for _ in range(2))
    return shared, cond, uncond


def hunyuan_video(config: Mapping[str, Any], video: Video, text: int, draw: Draw) -> tuple[Inputs, Inputs, Inputs]:
    shared = {
        "hidden_states": draw.normal(1, config["in_channels"], *video.latents(8, 4)),
        "timestep": draw.number(TIMESTEP, torch.float32),
        "guidance": draw.number(6.0, draw.dtype) * 1000.0,
    }
    cond, uncond = (
        {
            "encoder_hidden_states": draw.normal(1, text, config["text_embed_dim"]),
            "encoder_attention_mask": draw.is_kept(text, length).to(draw.dtype),
            "pooled_projections": draw.normal(1, config["pooled_projection_dim"]),
        }
        for length in _lengths(text)
    )
    return shared, cond, uncond


def wan(config: Mapping[str, Any], video: Video, text: int, draw: Draw) -> tuple[Inputs, Inputs, Inputs]:
    """A prompt is padded with zeros and has no mask."""
    shared = {
        "hidden_states": draw.normal(1, config["in_channels"], *video.latents(8, 4)),
        "timestep": draw.number(TIMESTEP, torch.int64),
    }
    cond, uncond = (
        {"encoder_hidden_states": draw.normal(1, text, config["text_dim"]) * draw.is_kept(text, length)[..., None]}
        for length in _lengths(text)
    )
    return shared, cond, uncond
