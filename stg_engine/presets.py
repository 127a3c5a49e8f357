"""What was published for each model, as data: layers and scales in a convention.

A preset names the implementation and version that it reproduces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stg_engine.config import AudioGuidance, ScheduleEntry, Skip, STGConfig, STGSchedule
from stg_engine.conventions import CONVENTIONS, DIFFUSERS, LIGHTRICKS, LTX_2, STGUIDANCE, WAN_WRAPPER


@dataclass(frozen=True)
class Preset:
    """A published setting of a model: layers and scales in a convention.

    convention      name of the `Convention`
    source          repository, version and file it was read from
    guidance_scale  the CFG scale published with it; the engine leaves CFG to the caller unless a schedule sets it
    transformer     class name of the transformer it was made for
    blocks          number of its layers
    note            the steps it was published with, and where the engine differs
    """

    name: str
    convention: str
    config: STGConfig
    source: str
    guidance_scale: float
    transformer: str
    blocks: int
    note: str


def _model(
    name: str,
    convention: str,
    fields: Mapping[str, Any],
    source: str,
    note: str,
    *,
    transformer: str,
    blocks: int,
    g: float,
) -> Preset:
    config = STGConfig(**{**CONVENTIONS[convention].fields, **fields})
    return Preset(name, convention, config, source, g, transformer, blocks, note)


_LTX = "LTXVideoTransformer3DModel"
_MOCHI = "MochiTransformer3DModel"
_COGVIDEOX = "CogVideoXTransformer3DModel"
_HUNYUAN = "HunyuanVideoTransformer3DModel"
_WAN = "WanTransformer3DModel"
_SVD = "UNetSpatioTemporalConditionModel"
_LTX2 = "LTX2VideoTransformer3DModel"
_OPEN_SORA = "STDiT3"
_PAPER = "Hyung et al., arXiv 2411.18664v1, appendix A1.3"

_LTX_13B = STGSchedule(
    tuple(
        ScheduleEntry(*entry)
        for entry in (  # sigma, layers, s, r, g
            (1.0, (), 0.0, 0.0, 1.0),
            (0.996, (11, 25, 35, 39), 0.0, 0.0, 1.0),
            (0.9933, (22, 35, 39), 4.0, 0.5, 6.0),
            (0.9850, (28,), 4.0, 0.5, 8.0),
            (0.9767, (28,), 4.0, 0.0, 6.0),
            (0.9008, (28,), 2.0, 0.0, 1.0),
            (0.6180, (28,), 1.0, 0.0, 1.0),
        )
    ),
    rule="at_or_below",
)


def _ltx_video() -> tuple[Preset, ...]:
    small: dict[str, Any] = {"transformer": _LTX, "blocks": 28, "g": 3.0}
    large: dict[str, Any] = {"transformer": _LTX, "blocks": 48}
    file = f"{LIGHTRICKS}, configs/ltxv-13b-0.9.8-dev.yaml"
    return (
        _model(
            "ltx-video-2b", "stg", {"layers": (19,)}, f"{STGUIDANCE}, LTXVideo/pipeline_stg_ltx.py", "50 steps", **small
        ),
        _model(
            "ltx-video-2b-lightricks",
            "ltx-video",
            {"layers": (19,), "rescale": 0.7, "cfg_star": False},
            f"{LIGHTRICKS}, 2B configs",
            "40 steps",
            **small,
        ),
        _model(
            "ltx-video-13b",
            "ltx-video",
            {"schedule": _LTX_13B},
            f"{file}, first pass",
            "30-step linear-quadratic schedule, last 3 steps not run; the file's rescale 1 means off, here 0",
            g=8.0,
            **large,
        ),
        _model(
            "ltx-video-13b-upscale",
            "ltx-video",
            {"layers": (27,), "cfg_star": False},
            f"{file}, second pass",
            "30-step schedule, first 17 steps not run",
            g=1.0,
            **large,
        ),
    )


def _stguidance() -> tuple[Preset, ...]:
    mochi: dict[str, Any] = {"transformer": _MOCHI, "blocks": 48, "g": 4.5}
    cogvideox: dict[str, Any] = {"transformer": _COGVIDEOX, "g": 6.0}
    hunyuan: dict[str, Any] = {"transformer": _HUNYUAN, "blocks": 60, "g": 1.0}
    cog_file = f"{STGUIDANCE}, CogVideoX/pipeline_stg_cogvideox.py"
    uncertain = "the author's lists say [34] and [35], 0-based; the paper says the 35th of 48"
    distilled = "guidance-distilled: embedded guidance 6.0 goes in as input; combined in the model's dtype there"
    return (
        _model(
            "mochi",
            "stg",
            {"layers": (34,)},
            f"{STGUIDANCE}, Mochi/pipeline_stg_mochi.py",
            f"64 steps; {uncertain}",
            **mochi,
        ),
        _model(
            "mochi-native",
            "stg",
            {"layers": (35,), "rescale": 0.7},
            "junhahyung/STGuidance before df04da0, mochi/src/genmo/mochi_preview",
            f"64 steps; {uncertain}",
            **mochi,
        ),
        _model("cogvideox-2b", "stg", {"layers": (11,)}, cog_file, "50 steps", blocks=30, **cogvideox),
        _model("cogvideox-5b", "stg", {"layers": (11,)}, cog_file, "50 steps", blocks=42, **cogvideox),
        _model(
            "hunyuan-video",
            "stg",
            {"layers": (2,)},
            f"{STGUIDANCE}, HunyuanVideo/pipeline_stg_hunyuan_video.py",
            f"30 steps; {distilled}; dual-stream block 2, the number of the block published in 2024, in another list",
            **hunyuan,
        ),
        _model(
            "hunyuan-video-2024",
            "stg",
            {"layers": (22,)},
            "junhahyung/STGuidance 0e3f6b1 (2024-12), HunyuanVideo/hyvideo",
            f"50 steps; {distilled}; single-stream block 2 = layer 22; its scale 2.0 in p + s (c - p) is 1.0 here",
            **hunyuan,
        ),
        _model(
            "svd",
            "stg",
            {
                "layers": (7,),
                "scale": 2.0,
                "mode": "attention",
                "axis": "spatial",
                "extra_skips": (Skip((7,), 0.5, "attention", "temporal"),),
                "rescale": 0.7,
            },
            "junhahyung/STGuidance before df04da0, diffusers/stablevideodiffusion",
            "25 steps; u0 = layer 7; guidance scale 1 to 3, linear over the frames; the paper has scale 2.0 for both",
            transformer=_SVD,
            blocks=16,
            g=3.0,
        ),
        _model(
            "open-sora",
            "stg",
            {
                "layers": (11,),
                "scale": 2.0,
                "mode": "attention",
                "axis": "spatial",
                "extra_skips": (Skip((11,), 2.0, "attention", "temporal"),),
            },
            _PAPER,
            "12th of 28 blocks; the code was not published, nor whether it rescales",
            transformer=_OPEN_SORA,
            blocks=28,
            g=7.0,
        ),
    )


def _wan() -> tuple[Preset, ...]:
    settings: tuple[tuple[str, str, dict[str, Any], str, str], ...] = (
        ("", "wan-official", {"layers": (2,), "scale": 2.0}, f"{STGUIDANCE}, Wan2.1/pipeline.py", "50 steps"),
        (
            "-community",
            "wan",
            {"layers": (8,)},
            f"{DIFFUSERS}, examples/community/pipeline_stg_wan.py",
            "50 steps; the example's layer, the default list is 3, 8, 16 at scale 0",
        ),
        ("-slg", "slg-uncond", {"layers": (10,), "start": 0.1}, f"{WAN_WRAPPER}, WanVideoSLG", "the node's defaults"),
    )
    return tuple(
        _model(f"wan-2.1-{size}{suffix}", name, fields, source, note, transformer=_WAN, blocks=blocks, g=5.0)
        for size, blocks in (("1.3b", 30), ("14b", 40))
        for suffix, name, fields, source, note in settings
    )


def _ltx_2() -> tuple[Preset, ...]:
    audio = AudioGuidance(guidance_scale=7.0)
    older = "40 steps; chosen while the whole self-attention branch was dropped; the later code passes V, as here"
    return tuple(
        _model(
            name,
            "ltx-2",
            {"layers": (layer,), "rescale": 0.7, "modality_scale": 3.0, "audio": audio},
            f"{LTX_2}, default parameters",
            note,
            transformer=_LTX2,
            blocks=48,
            g=3.0,
        )
        for name, layer, note in (("ltx-2.0", 29, older), ("ltx-2.3", 28, "30 steps"))
    )


PRESETS = {preset.name: preset for preset in (*_ltx_video(), *_stguidance(), *_wan(), *_ltx_2())}


def preset(name: str, **changes: Any) -> STGConfig:
    """The config of a model's preset, or of a convention with `layers` or `schedule` among `changes`.

    `changes` replace fields. Raises `ValueError` that lists the known names, and for a convention without layers.
    """
    if name in PRESETS:
        return replace(PRESETS[name].config, **changes)
    if name not in CONVENTIONS:
        raise ValueError(
            f"preset={name!r} is not known; choose one of {', '.join(PRESETS)}; or, with layers=(...), "
            f"one of {', '.join(CONVENTIONS)}"
        )
    if "layers" not in changes and "schedule" not in changes:
        raise ValueError(
            f"preset={name!r} says how to combine, for any model: name the blocks to skip with layers=(...), "
            f"or choose one of {', '.join(PRESETS)}"
        )
    return STGConfig(**{**CONVENTIONS[name].fields, **changes})
