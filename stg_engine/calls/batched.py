"""Pipelines with one call per step, on rows [uncond, cond] or [cond]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stg_engine.calls.base import Calls, Step, output_like
from stg_engine.guidance import zero_init
from stg_engine.inputs import split_rows


class Batched(Calls):
    """LTX-Video, Mochi, ..."""

    def predict(self, step: Step, arguments: dict[str, Any]) -> Any:
        return_dict = arguments.pop("return_dict", True)
        shared, cond, uncond = split_rows(step.denoiser.spec, arguments, 2 if self.has_uncond() else 1)
        latents, sigma = shared.get(step.denoiser.spec.latents[0]), self._sigma(step, shared)
        if step.guidance.is_zero:
            results = self.in_every_row(zero_init(latents, sigma))
        else:
            uncond = uncond if self.reads_uncond(step.guidance) else None
            names, (rows, *_) = step.denoiser.predict(step.guidance, shared, cond, uncond, step.forward)
            results = self.results(step, names, rows, latents=latents, sigma=sigma)
        ordered = [results[name] for name in ("uncond", "cond") if name in results]
        return output_like(ordered[0] if len(ordered) == 1 else torch.cat(ordered), return_dict=return_dict)

    def _sigma(self, step: Step, shared: dict[str, Any]) -> float | Tensor | None:
        """The step's noise level, of each token where they have timesteps of their own: [B, S]."""
        timestep = shared.get("timestep")
        if step.sigma is None or not isinstance(timestep, Tensor) or timestep.ndim != 2:
            return step.sigma
        return timestep / self.pipe.scheduler.config.num_train_timesteps


class LateScale(Batched):
    """CogVideoX: dynamic CFG sets a step's guidance scale behind the model's call; CFG is on or off for the loop."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._has_uncond = pipe.guidance_scale > 1

    def has_uncond(self) -> bool:
        return self._has_uncond

    def guidance_scale(self, model: Any) -> float | Tensor | None:
        return None


class FixedScale(Batched):
    """Sana-Video: the guidance scale is a local of the call; in a step a callback can but switch CFG off."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._scale = pipe.guidance_scale

    def guidance_scale(self, model: Any) -> float:
        return float(self._scale)


class SameDtype(FixedScale):
    """Latte, Allegro: the scheduler gives latents the dtype of the prediction, and the transformer takes only its own.

    The rows that go back are rounded to that; `r + g (r - r) = r` holds as it does in float32. CFG is on or off for the
    loop.
    """

    dtype = None

    def has_uncond(self) -> bool:
        return bool(self._scale > 1)


class PerFrame(Batched):
    """Stable Video Diffusion: a guidance scale per frame, [B, F, 1, 1, 1], CFG for the loop, dtypes as in Latte."""

    models = ("unet",)
    dtype = None

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._has_uncond = bool(pipe.do_classifier_free_guidance)  # asks the device, if it is asked there

    def has_uncond(self) -> bool:
        return self._has_uncond
