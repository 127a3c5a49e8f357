"""Tiny random LTX-Video models and pipelines, offline, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor, nn

TEXT_CHANNELS = 32


def tiny_transformer(
    num_layers: int = 4,
    heads: int = 4,
    head_dim: int = 8,
    channels: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    affine: bool = False,
) -> LTXVideoTransformer3DModel:
    """Norm weights, ones in a new model, are random; `affine` gives norm1 and norm2 weights and biases, too."""
    torch.manual_seed(seed)
    model = LTXVideoTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        num_layers=num_layers,
        caption_channels=TEXT_CHANNELS,
        norm_elementwise_affine=affine,
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm2) if affine else ():
                norm.bias = nn.Parameter(torch.randn_like(norm.weight))
        for name, parameter in model.transformer_blocks.named_parameters():
            if "norm" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval().to(dtype)


def tiny_inputs(
    videos: int = 1,
    *,
    per_token: bool = False,
    tokens: int = 6,
    channels: int = 8,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(shared, cond, uncond) for 2 x 3 x 4 latents; prompts have unequal lengths, given by masks."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = 2, 3, 4
    size = frames * height * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    timestep = torch.full((videos,), 700.0, dtype=dtype)
    if per_token:
        first_frame = torch.arange(size) < height * width
        timestep = timestep[:, None] * (~first_frame)[None]
    lengths = torch.randint(1, tokens + 1, (2, videos), generator=generator)
    masks = (torch.arange(tokens) < lengths[..., None]).to(torch.int64)
    shared = {
        "hidden_states": normal(videos, size, channels),
        "timestep": timestep,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }
    cond, uncond = (
        {"encoder_hidden_states": normal(videos, tokens, TEXT_CHANNELS), "encoder_attention_mask": mask}
        for mask in masks
    )
    return shared, cond, uncond


def tiny_vae(seed: int = 0) -> AutoencoderKLLTXVideo:
    torch.manual_seed(seed)
    return AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()


def tiny_pipeline(kind: type = LTXPipeline, *, num_layers: int = 4, seed: int = 0, **components: Any) -> Any:
    """An LTX pipeline of `kind` with random weights; 32 x 32 pixels and 9 frames are 3 x 8 x 8 latents."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters, *(f"▁{letter}" for letter in letters)]
    torch.manual_seed(seed)
    text = T5Config(
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        dropout_rate=0.0,
    )
    parts = {
        "transformer": tiny_transformer(num_layers, seed=seed),
        "vae": tiny_vae(seed),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": T5EncoderModel(text).eval(),
        "tokenizer": T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0),
        **components,
    }
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "num_inference_steps": 3,
    "max_sequence_length": 16,
    "output_type": "latent",
}
"""Arguments of a short call of a tiny pipeline."""


def latents_of(pipe: Any, prompt: str | list[str] = "a red cat", *, seed: int = 0, **arguments: Any) -> Tensor:
    """Final latents [B, C, F, H, W] or [B, S, C] of a short call with fixed initial noise."""
    count = (1 if isinstance(prompt, str) else len(prompt)) * arguments.get("num_videos_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    call = {**CALL, "guidance_scale": 3.0, "generator": generators, **arguments}
    return pipe(prompt=prompt, return_dict=False, **call)[0]


def on_step(change: Any) -> dict[str, Any]:
    """Arguments of a call in which `change(pipe, index, tensors)` is called after every step."""

    def callback(pipe, index, timestep, tensors):
        return change(pipe, index, dict(tensors))

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
