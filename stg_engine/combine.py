"""A step's rows -> the guided prediction, by the conventions of a config: which scales, which space, which code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stg_engine import guidance
from stg_engine.config import StepGuidance, STGConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stg_engine.fused import Fusion
    from stg_engine.models import ModelSpec


def check_conventions(config: STGConfig, spec: ModelSpec, *, has_attention: bool = True) -> None:
    """ValueError if the config skips what is not there, or combines in a way that the family's outputs do not allow."""
    if not has_attention and any(skip.mode == "attention" for skip in config.skips):
        raise ValueError(f"mode='attention' is not allowed: the blocks have no {' or '.join(spec.self_attention)}")
    if (config.space == "x0" or config.zero_init < 1) and not spec.velocity_of:
        field = f"space={config.space!r}" if config.space == "x0" else f"zero_init={config.zero_init}"
        raise ValueError(f"{field} is not allowed: {spec.family} does not predict the velocity v of x0 = x - sigma v")
    if config.audio is not None and not spec.links:
        raise ValueError(f"audio={config.audio!r} is not allowed: {spec.family} predicts no audio")
    if config.modality_scale != 1 and not spec.links:
        raise ValueError(f"modality_scale={config.modality_scale} is not allowed: {spec.family} has one modality")


def per_output(
    token_sigmas: Tensor | Sequence[Tensor] | None, sigma: float | None, count: int
) -> list[float | Tensor | None]:
    """One entry per output. ValueError if there are token sigmas for another number of them."""
    if token_sigmas is None:
        return [sigma] * count
    each = [token_sigmas] if isinstance(token_sigmas, Tensor) else list(token_sigmas)
    if len(each) != count:
        raise ValueError(f"token_sigmas holds {len(each)} tensors; it must hold one for each of {count} outputs")
    return list(each)


class Combiner:
    """Combines the branches of a step; `fusion` says whether its blocks were fused, then so is this."""

    def __init__(self, config: STGConfig, fusion: Fusion) -> None:
        self.config, self.fusion = config, fusion
        self._scales: dict[tuple, Tensor] = {}

    def __call__(
        self,
        step: StepGuidance,
        names: tuple[str, ...],
        rows: Tensor,
        guidance_scale: float | Tensor,
        *,
        rescale: float = 0.0,
        is_audio: bool = False,
        dtype: torch.dtype | None = None,
        latents: Tensor | None = None,
        sigma: float | Tensor | None = None,
    ) -> Tensor:
        """See `Denoiser.combine`."""
        config = self.config
        audio = step.audio if is_audio else None
        guidance_scale = _first(audio and audio.guidance_scale, guidance_scale)
        modality_scale = _first(audio and audio.modality_scale, step.modality_scale)
        scales = [_first(audio and audio.scale, skip.scale) for skip in step.skips] if step.names else []
        rescale = _first(audio and audio.rescale, step.rescale) or rescale
        cfg_star = config.cfg_star and not step.is_plain and "uncond" in names
        dtype = torch.promote_types(rows.dtype, torch.float32) if dtype is None else dtype
        in_x0 = config.space == "x0" and (rescale > 0 or cfg_star) and not step.is_plain
        if in_x0 and (latents is None or sigma is None):
            missing = "latents" if latents is None else "sigma"
            raise ValueError(f"{missing}=None is not allowed: space='x0' needs x and sigma for x0 = x - sigma v")
        if self._is_fused(step, rows, guidance_scale, in_x0):
            if config.weak_pass == "negative_prompt":
                guidance_scale = guidance.scale_for_cond(float(guidance_scale), scales)
            extra = (modality_scale - 1.0,) if "modality" in names else ()
            return self._fused(names, rows, (float(guidance_scale), rescale, *scales, *extra), cfg_star, dtype)
        branches = dict(zip(names, rows.chunk(len(names)), strict=True))
        if isinstance(guidance_scale, Tensor):
            _check_broadcast(guidance_scale, branches["cond"])
        return guidance.combine(
            branches["cond"],
            branches.get("uncond"),
            [(branches[name], scale) for name, scale in zip(step.names, scales, strict=True)],
            guidance_scale=guidance_scale,
            modality=branches.get("modality"),
            modality_scale=modality_scale,
            weak_pass=config.weak_pass,
            rescale=rescale,
            cfg_star=cfg_star,
            rescale_over=config.rescale_over,
            arithmetic=config.arithmetic,
            latents=latents if in_x0 else None,
            sigma=sigma if in_x0 else None,
        ).to(dtype)

    def note_differences(
        self, into: dict[str, Tensor], step: StepGuidance, names: tuple[str, ...], rows: Tensor
    ) -> None:
        """max |c - p| of each weak branch (|u - p| on the negative prompt), unless `into` has one already."""
        branches = dict(zip(names, rows.chunk(len(names)), strict=True))
        skips = zip(step.names, step.skips, strict=False)
        layers = {name: f" {', '.join(map(str, skip.layers))}" for name, skip in skips}
        for name, _ in step.weak:
            strong = "uncond" if name in layers and step.weak_pass == "negative_prompt" else "cond"
            key = name if self.config.schedule is None else name + layers.get(name, "")
            if key not in into:
                into[key] = guidance.largest_difference(branches[strong], branches[name])

    def _is_fused(self, step: StepGuidance, rows: Tensor, guidance_scale: Any, in_x0: bool) -> bool:
        suits = self.config.arithmetic == "float32" and not in_x0 and not isinstance(guidance_scale, Tensor)
        return step.is_guided and self.fusion.is_on and suits and rows.is_contiguous()

    def _fused(
        self, names: tuple[str, ...], rows: Tensor, scales: tuple[float, ...], cfg_star: bool, dtype: torch.dtype
    ) -> Tensor:
        from stg_kernels import combine_guidance

        return combine_guidance(
            rows,
            self._on_device(scales, rows.device),
            has_uncond="uncond" in names,
            rescale=scales[1] > 0,
            over_batch=self.config.rescale_over == "batch",
            cfg_star=cfg_star,
            dtype=dtype,
        )

    def _on_device(self, values: tuple[float, ...], device: torch.device) -> Tensor:
        if (values, device) not in self._scales:
            self._scales = {(values, device): torch.tensor(values, dtype=torch.float32, device=device)}
        return self._scales[values, device]


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _check_broadcast(scale: Tensor, prediction: Tensor) -> None:
    """ValueError unless a tensor of guidance scales fits a prediction."""
    pairs = list(zip(reversed(scale.shape), reversed(prediction.shape), strict=False))
    if scale.ndim > prediction.ndim or any(size not in (1, full) for size, full in pairs):
        raise ValueError(
            f"guidance_scale has shape {tuple(scale.shape)}, which does not broadcast to a prediction's, "
            f"{tuple(prediction.shape)}"
        )
