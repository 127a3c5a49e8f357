"""Which diffusers pipelines `generate` calls, and how its options become arguments of their calls."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from stg_engine.calls import PIPELINES
from stg_engine.config import AudioGuidance, STGConfig
from stg_engine.settings import Setting


@dataclass(frozen=True)
class TextToVideo:
    """A pipeline that makes a clip from a prompt alone.

    fps             frames per second of the clips in diffusers' examples; unused where the call has its own
    guidance_scale  the call's name for the scale of CFG
    package         one that its prompts need beside diffusers, or None
    """

    fps: int
    guidance_scale: str = "guidance_scale"
    package: str | None = None


TEXT_TO_VIDEO = {
    "LTXPipeline": TextToVideo(25),
    "LTXConditionPipeline": TextToVideo(25),
    "LTX2Pipeline": TextToVideo(24),
    "LTX2ConditionPipeline": TextToVideo(24),
    "MochiPipeline": TextToVideo(30),
    "CogVideoXPipeline": TextToVideo(8),
    "HunyuanVideoPipeline": TextToVideo(15, guidance_scale="true_cfg_scale"),
    "WanPipeline": TextToVideo(16),
    "SkyReelsV2Pipeline": TextToVideo(24, package="ftfy"),
    "SkyReelsV2DiffusionForcingPipeline": TextToVideo(24, package="ftfy"),
    "LattePipeline": TextToVideo(8),
}
"""By class name."""

# Names that calls have for an option.
_NAMES = {
    "height": ("height",),
    "width": ("width",),
    "frames": ("num_frames", "video_length"),
    "fps": ("frame_rate", "fps"),
    "steps": ("num_inference_steps",),
}


def check_pipeline(model: str, pipeline: str) -> None:
    """ValueError for a class of pipelines that cannot make a clip from a prompt here; `model` is the user's word."""
    if pipeline in TEXT_TO_VIDEO:
        kind = TEXT_TO_VIDEO[pipeline]
        if kind.package is not None and find_spec(kind.package) is None:
            raise ValueError(
                f"model={model!r}: prompts of {pipeline} need the package {kind.package}, which is not installed"
            )
        return
    why = "which is not supported"
    if pipeline in PIPELINES:
        why = "which generate does not run (it gives a pipeline a prompt, no image); use stg_engine.attach in Python"
    raise ValueError(f"model={model!r} is a {pipeline}, {why}; generate runs {', '.join(TEXT_TO_VIDEO)}")


def call_arguments(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` (height, width, frames, fps, steps) that are not None, as arguments of the pipeline's call.

    ValueError for one that it does not take, but for fps, which is the file's, too.
    """
    known = _parameters(pipe)
    arguments = {}
    for option, value in options.items():
        name = next((name for name in _NAMES[option] if name in known), None)
        if name is not None and value is not None:
            arguments[name] = value
        elif value is not None and option != "fps":
            raise ValueError(f"{option}={value} is not allowed: {type(pipe).__name__} does not take it")
    return arguments


def default_of(pipe: Any, option: str) -> Any:
    """The default that the pipeline's call has for an option; None if it has none, or finds it out when it runs."""
    known = _parameters(pipe)
    defaults = [known[name].default for name in _NAMES[option] if name in known]
    return defaults[0] if defaults and defaults[0] is not inspect.Parameter.empty else None


def guidance_arguments(pipe: Any, setting: Setting) -> dict[str, Any]:
    """The scales of the guidance that the pipeline applies by itself.

    CFG alone; where the pipeline has STG of its own (LTX-2) all that it multiplies by. `engine_config` is the rest.
    """
    g, config = setting.guidance_scale, setting.config
    if not _has_own_guidance(pipe):
        return {TEXT_TO_VIDEO[type(pipe).__name__].guidance_scale: g}
    audio = (None if config is None else config.audio) or AudioGuidance()
    rescale = 0.0 if config is None else config.rescale
    scale, modality = (0.0, 1.0) if config is None else (config.scale, config.modality_scale)
    return {
        "guidance_scale": g,
        "audio_guidance_scale": g if g <= 1 or audio.guidance_scale is None else audio.guidance_scale,
        "guidance_rescale": rescale,
        "audio_guidance_rescale": rescale if audio.rescale is None else audio.rescale,
        **dict.fromkeys(("stg_scale", "audio_stg_scale"), scale),
        **dict.fromkeys(("modality_scale", "audio_modality_scale"), modality),
    }


def engine_config(pipe: Any, config: STGConfig) -> STGConfig:
    """What to attach: `config` without what `guidance_arguments` has."""
    return replace(config, rescale=0.0, audio=None) if _has_own_guidance(pipe) else config


def check_size(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """ValueError for a size that the patches do not divide, which many pipelines find out in the middle of a step.

    What else they demand they check themselves when they are called.
    """
    known = {name: parameter.default for name, parameter in _parameters(pipe).items()} | dict(arguments)
    names = ("vae_scale_factor_spatial", "vae_spatial_scale_factor", "vae_scale_factor")
    factors = [getattr(pipe, name, 1) for name in names]
    patch = models_of(pipe)[0].config.get("patch_size", 1)
    side = max(factors) * (patch if isinstance(patch, int) else patch[-1])
    is_ltx = hasattr(pipe, "transformer_spatial_patch_size")
    if is_ltx:  # these demand 32 whatever the VAE
        side = math.lcm(32, pipe.vae_spatial_compression_ratio * pipe.transformer_spatial_patch_size)
    for name in ("height", "width"):
        if known[name] is not None and known[name] % side:
            raise ValueError(f"{name}={known[name]} is not allowed; it must be a multiple of {side}")
    if is_ltx and known["num_frames"] is not None:
        frames, group = known["num_frames"], pipe.vae_temporal_compression_ratio * pipe.transformer_temporal_patch_size
        if (frames - 1) % group:
            raise ValueError(f"frames={frames} is not allowed; it must be a multiple of {group} plus 1")


def models_of(pipe: Any) -> list[Any]:
    """The transformers that a denoising loop of the pipeline calls."""
    names = PIPELINES[type(pipe).__name__].models
    return [model for name in names if (model := getattr(pipe, name, None)) is not None]


def _has_own_guidance(pipe: Any) -> bool:
    return PIPELINES[type(pipe).__name__].own is not None


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters
