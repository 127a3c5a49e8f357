"""The parts of the shipped LTX-Video pipeline, untrained: sizes, builders, and how latents are normalised."""

from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from stg_engine.demo.data import WORDS

MAX_TOKENS = 128  # LTXPipeline pads prompts to this by default

#: 16x16x2 compression: 17x64x64 pixels -> 9x4x4 latents. The decoder keeps only (2, 2, 2) upsamplers, so the spatial
#: rest is the patch of 8.
VAE_CONFIG = {
    "latent_channels": 48,
    "block_out_channels": (48, 96),
    "down_block_types": ("LTXVideo095DownBlock3D",),
    "downsample_type": ("spatiotemporal",),
    "layers_per_block": (1, 1),
    "spatio_temporal_scaling": (True,),
    "decoder_block_out_channels": (88,),
    "decoder_layers_per_block": (1, 1),
    "decoder_spatio_temporal_scaling": (True,),
    "decoder_inject_noise": (False, False),
    "upsample_residual": (True,),
    "upsample_factor": (1,),
    "patch_size": 8,
}
TEXT_WIDTH = 64
TRANSFORMER_CONFIG = {
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "cross_attention_dim": 192,
    "num_layers": 12,
    "caption_channels": TEXT_WIDTH,
}


def build_vae(**changes: Any) -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(**VAE_CONFIG | changes)


def build_transformer(**changes: Any) -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(**TRANSFORMER_CONFIG | changes)


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose every piece is a whole word of `data.WORDS`."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    return T5Tokenizer(vocab=special + [(f"▁{word}", -1.0) for word in WORDS], extra_ids=0, model_max_length=MAX_TOKENS)


def build_text_encoder() -> T5EncoderModel:
    """A two-layer T5 encoder in eval mode (T5's dropout is live otherwise)."""
    config = T5Config(
        vocab_size=32,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval()


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps, most of them at high noise: a latent's 6,912 numbers agree on so few facts (where, which way) that
    these are settled above sigma 0.9 already. Without the shift, 1 of 8 clips was right where 5 are with it."""
    return FlowMatchEulerDiscreteScheduler(shift=5.0)


def set_latent_statistics(vae: AutoencoderKLLTXVideo, latents: Tensor) -> None:
    """Store the mean and standard deviation per channel of raw latents [B, C, F, H, W]; LTXPipeline undoes them."""
    vae.latents_mean.copy_(latents.mean((0, 2, 3, 4)))
    vae.latents_std.copy_(latents.std((0, 2, 3, 4)))


@torch.no_grad()
def encode(vae: AutoencoderKLLTXVideo, clips: Tensor) -> Tensor:
    """Clips [B, 3, F, H, W] in [-1, 1] -> normalised packed latents [B, S, C], as the transformer takes them."""
    latents = vae.encode(clips.to(vae.dtype)).latent_dist.mode()
    latents = LTXPipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    return LTXPipeline._pack_latents(latents)
