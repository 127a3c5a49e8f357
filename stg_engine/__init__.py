"""Spatiotemporal Skip Guidance for video diffusion: cond, uncond and skip passes as rows of one forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stg_engine.config import AudioGuidance, ScheduleEntry, Skip, STGConfig, STGSchedule
from stg_engine.plan import Plan

if TYPE_CHECKING:
    from stg_kernels.attention.dispatch import tuning

    from stg_engine.denoiser import Denoiser
    from stg_engine.guider import STGGuidance
    from stg_engine.pipeline import Engine, attach, detach

__version__ = "0.1.0"
__all__ = [
    "AudioGuidance",
    "Denoiser",
    "Engine",
    "Plan",
    "STGConfig",
    "STGGuidance",
    "STGSchedule",
    "ScheduleEntry",
    "Skip",
    "attach",
    "detach",
    "tuning",
]

_PIPELINE = dict.fromkeys(("Engine", "attach", "detach"), "stg_engine.pipeline")
_LAZY = {
    "Denoiser": "stg_engine.denoiser",
    "STGGuidance": "stg_engine.guider",
    "tuning": "stg_kernels.attention.dispatch",
    **_PIPELINE,
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
