"""Published settings as data. A preset names the implementation and the version that it reproduces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from stg_engine.config import ScheduleEntry, STGConfig, STGSchedule


@dataclass(frozen=True)
class Preset:
    """A published setting.

    source          repository, version and file it was read from
    guidance_scale  the CFG scale published with it; the engine leaves CFG to the caller unless a schedule sets it
    transformer     class name of the transformer it was made for
    blocks          number of its layers
    note            the steps it was published with
    """

    name: str
    config: STGConfig
    source: str
    guidance_scale: float
    transformer: str
    blocks: int
    note: str


_LTX = "LTXVideoTransformer3DModel"
_LIGHTRICKS = "Lightricks/LTX-Video 5260738 (2025-10-25)"


def _entry(sigma: float, layers: tuple[int, ...], scale: float, rescale: float, guidance_scale: float) -> ScheduleEntry:
    return ScheduleEntry(sigma, layers, scale, rescale, guidance_scale)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "ltx-video-2b",
            STGConfig(layers=(19,), scale=1.0, mode="residual"),
            "junhahyung/STGuidance df04da0 (2025-04-07), LTXVideo/pipeline_stg_ltx.py",
            guidance_scale=3.0,
            transformer=_LTX,
            blocks=28,
            note="50 steps",
        ),
        Preset(
            "ltx-video-2b-lightricks",
            STGConfig(layers=(19,), scale=1.0, mode="attention", rescale=0.7, arithmetic="model"),
            f"{_LIGHTRICKS}, 2B configs",
            guidance_scale=3.0,
            transformer=_LTX,
            blocks=28,
            note="40 steps",
        ),
        Preset(
            "ltx-video-13b",
            STGConfig(
                mode="attention",
                cfg_star=True,
                arithmetic="model",
                schedule=STGSchedule(
                    (
                        _entry(1.0, (), 0.0, 0.0, 1.0),
                        _entry(0.996, (11, 25, 35, 39), 0.0, 0.0, 1.0),
                        _entry(0.9933, (22, 35, 39), 4.0, 0.5, 6.0),
                        _entry(0.9850, (28,), 4.0, 0.5, 8.0),
                        _entry(0.9767, (28,), 4.0, 0.0, 6.0),
                        _entry(0.9008, (28,), 2.0, 0.0, 1.0),
                        _entry(0.6180, (28,), 1.0, 0.0, 1.0),
                    ),
                    rule="at_or_below",
                ),
            ),
            f"{_LIGHTRICKS}, configs/ltxv-13b-0.9.8-dev.yaml, first pass",
            guidance_scale=8.0,
            transformer=_LTX,
            blocks=48,
            note="30-step linear-quadratic schedule, last 3 steps not run; the file's rescale 1 means off, here 0",
        ),
        Preset(
            "ltx-video-13b-upscale",
            STGConfig(layers=(27,), scale=1.0, mode="attention", arithmetic="model"),
            f"{_LIGHTRICKS}, configs/ltxv-13b-0.9.8-dev.yaml, second pass",
            guidance_scale=1.0,
            transformer=_LTX,
            blocks=48,
            note="30-step schedule, first 17 steps not run",
        ),
        Preset(
            "mochi",
            STGConfig(layers=(34,), scale=1.0, mode="residual"),
            "junhahyung/STGuidance df04da0 (2025-04-07), Mochi/pipeline_stg_mochi.py",
            guidance_scale=4.5,
            transformer="MochiTransformer3DModel",
            blocks=48,
            note="64 steps",
        ),
    )
}


def preset(name: str, **changes: Any) -> STGConfig:
    """The config of a preset; `changes` replace fields of it. Raises `ValueError` that lists the known names."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not known; choose one of {', '.join(PRESETS)}")
    return replace(PRESETS[name].config, **changes)
