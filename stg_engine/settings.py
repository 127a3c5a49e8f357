"""From what the user typed to a model and a guidance setting. Reads a transformer's config.json, never its weights."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stg_engine import demo
from stg_engine.config import Skip, StepGuidance, STGConfig
from stg_engine.conventions import CONVENTIONS
from stg_engine.models import ModelSpec, spec_of
from stg_engine.plan import Plan, Plans, build_plans, check_layers
from stg_engine.presets import PRESETS, Preset

_CONFIG = "transformer/config.json"
# Of each family's pipeline, by class name of the transformer.
GUIDANCE_SCALES = {
    "LTXVideoTransformer3DModel": 3.0,
    "LTX2VideoTransformer3DModel": 3.0,
    "MochiTransformer3DModel": 4.5,
    "CogVideoXTransformer3DModel": 6.0,
    "HunyuanVideoTransformer3DModel": 1.0,  # beside the distilled guidance
    "WanTransformer3DModel": 5.0,
    "SkyReelsV2Transformer3DModel": 6.0,
    "LatteTransformer3DModel": 7.5,
    "UNetSpatioTemporalConditionModel": 3.0,
}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Model:
    """A transformer known by its config.

    name    what the user typed
    source  folder or hub id to load a pipeline from; None if only the published shape is known
    """

    name: str
    source: str | None
    spec: ModelSpec
    num_layers: int
    is_shipped: bool = False


@dataclass(frozen=True)
class Setting:
    """`config` is None without a skip branch: plain CFG, nothing to attach. `preset` names a preset or convention."""

    config: STGConfig | None
    guidance_scale: float
    preset: str | None

    def __str__(self) -> str:
        origin = ""
        if self.preset in CONVENTIONS:
            convention = CONVENTIONS[self.preset]
            origin = f"convention {self.preset} ({convention.source}; {convention.note}): "
        elif self.preset is not None:
            published = PRESETS[self.preset]
            is_changed = (self.config, self.guidance_scale) != (published.config, published.guidance_scale)
            changed = ", changed" if is_changed else ""
            origin = f"preset {self.preset} ({published.source}; {published.note}){changed}: "
        if self.config is None:
            return f"{origin}no skip branch, guidance scale {self.guidance_scale:g}"
        weak = {"prompt": "", "negative_prompt": " on the negative prompt", "uncond": " in uncond"}
        where = weak[self.config.weak_pass]
        if self.config.schedule is not None:
            return f"{origin}a schedule of {len(self.config.schedule.entries)} entries, {self.config.mode} skip{where}"
        skips = ", ".join(
            f"{kind_of(s)} skip of {', '.join(map(str, s.layers))}{where} at scale {s.scale:g}"
            for s in self.config.skips
        )
        return f"{origin}{skips}, rescale {self.config.rescale:g}, guidance scale {self.guidance_scale:g}"

    def plan(self, model: Model) -> Plan | Plans:
        """Rows per block; one plan per entry of a schedule. ValueError for a layer that the model does not have."""
        options = model.spec.plan_options(is_on=self.config is not None)
        if self.config is not None and self.config.schedule is not None:
            return build_plans(self.config, model.num_layers, guidance_scale=self.guidance_scale, **options)
        guidance = StepGuidance() if self.config is None else self.config
        return Plan.build(guidance, model.num_layers, uncond=self.guidance_scale > 1, **options)


def kind_of(skip: Skip) -> str:
    """ "residual", "spatial attention", ..."""
    return skip.mode if skip.axis is None else f"{skip.axis} {skip.mode}"


def find_model(name: str | None) -> Model:
    """The shipped model (None), a folder, a published name such as "ltx-video-13b", or a hub id (fetches config.json).

    ValueError if there is no such model or its config cannot be read, TypeError for an unsupported transformer.
    """
    if name is None:
        folder = demo.model_path()
        if not (folder / _CONFIG).is_file():
            raise ValueError(
                f"model: the shipped model is missing, no {folder / _CONFIG}; name another one with --model"
            )
        return _from_config(folder / _CONFIG, str(folder), str(folder), is_shipped=True)
    folder = Path(name)
    if folder.is_dir():
        for path in (folder / _CONFIG, folder / "unet" / "config.json", folder / "config.json"):
            if path.is_file():
                return _from_config(path, name, name, is_shipped=folder.resolve() == demo.model_path().resolve())
        raise ValueError(f"model={name!r}: the folder holds neither {_CONFIG} nor config.json")
    if name in PRESETS:
        return Model(name, None, spec_of(PRESETS[name].transformer), PRESETS[name].blocks)
    if _HUB_ID.fullmatch(name):
        return _from_config(_fetch(name, _CONFIG), name, name)
    raise ValueError(f"model={name!r} is neither a folder, nor a hub id (owner/name), nor one of {', '.join(PRESETS)}")


def pipeline_class(name: str | None) -> str | None:
    """Class name of the pipeline in a folder or at a hub id (fetches model_index.json); None if there is none."""
    folder, index = demo.model_path() if name is None else Path(name), "model_index.json"
    is_hub_id = name is not None and not folder.is_dir() and name not in PRESETS and _HUB_ID.fullmatch(name)
    path = _fetch(str(name), index) if is_hub_id else folder / index
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["_class_name"]) if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model={name!r}: cannot read {path}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user typed about model and guidance; None where nothing was typed."""

    model: str | None = None
    preset: str | None = None
    stg_layers: tuple[int, ...] | None = None
    stg_scale: float | None = None
    stg_mode: str | None = None
    stg_axis: str | None = None
    rescale: float | None = None
    guidance_scale: float | None = None


def choose_setting(model: Model, options: Options) -> Setting:
    """The preset asked for, else the model's own; what the user typed replaces its fields.

    Typed layers without a preset start from STGConfig's defaults: a scale tuned for other layers means nothing.
    ValueError for a value that is not allowed or would have no effect, and if there is neither a preset nor layers.
    """
    name = options.preset
    if name is None and options.stg_layers is None and options.stg_scale != 0 and not model.is_shipped:
        name = model.name if model.name in PRESETS else model.spec.presets.get(model.num_layers)
    convention = CONVENTIONS.get(name or "")
    if convention is not None and options.stg_layers is None:
        raise ValueError(f"preset={name!r} says how to combine, for any model: name the blocks with --stg-layers too")
    published = None if name is None or convention is not None else _preset(name, model)
    base = None if published is None else published.config
    if published is None and options.stg_layers is None and model.is_shipped:
        base = demo.SETTING.config
    typed: dict[str, Any] = {"layers": options.stg_layers, "scale": options.stg_scale, "mode": options.stg_mode}
    typed |= {"axis": options.stg_axis, "rescale": options.rescale}
    changes = {field: value for field, value in typed.items() if value is not None}
    g = _guidance_scale(model, options, published)
    if base is not None and base.schedule is not None:
        _refuse_beside_schedule(name, base, options)
    if base is None and options.stg_layers is None:
        if options.stg_scale != 0:
            raise ValueError(
                f"stg_layers: {model.name} has no published setting; name the blocks to skip, "
                f"0 to {model.num_layers - 1}, or pass --stg-scale 0"
            )
        base, changes["layers"] = None, (0,)  # checks mode and rescale, and is off
    fields = {} if convention is None else convention.fields
    config = STGConfig(**{**fields, **changes}) if base is None else replace(base, **changes)
    for skip in config.skips if base is not None or options.stg_layers is not None else ():
        check_layers(skip, model.num_layers, model.spec.axes)
    is_off = all(skip.scale == 0 for skip in config.skips)
    return Setting(None if is_off else config, g, name)


def _preset(name: str, model: Model) -> Preset:
    if name not in PRESETS:
        raise ValueError(
            f"preset={name!r} is not known; choose one of {', '.join(PRESETS)}; or, with --stg-layers, one of "
            f"{', '.join(CONVENTIONS)}"
        )
    published = PRESETS[name]
    if (published.transformer, published.blocks) != (model.spec.transformer, model.num_layers):
        raise ValueError(
            f"preset={name!r} was published for {published.blocks} blocks of {spec_of(published.transformer).family}, "
            f"{model.name} has {model.num_layers} of {model.spec.family}; "
            f"name the blocks to skip with --stg-layers, or the model with --model (--model {name})"
        )
    return PRESETS[name]


def _guidance_scale(model: Model, options: Options, published: Preset | None) -> float:
    g = options.guidance_scale
    if g is None:
        default = demo.SETTING.guidance_scale if model.is_shipped else GUIDANCE_SCALES.get(model.spec.transformer, 3.0)
        return default if published is None else published.guidance_scale
    if not 0 <= g < math.inf:
        raise ValueError(
            f"guidance_scale={g} is not allowed; it must be a finite number of at least 0 (1 or less is off)"
        )
    return g


def _refuse_beside_schedule(name: str | None, config: STGConfig, options: Options) -> None:
    """ValueError for an option whose value the schedule's entries set; `STGConfig` cannot tell typed from default."""
    for field in ("stg_layers", "stg_scale", "rescale", "guidance_scale"):
        if getattr(options, field) is not None:
            raise ValueError(
                f"{field}={getattr(options, field)} has no effect: the preset {name!r} sets it per noise level; "
                "leave it out, or name --stg-layers without --preset"
            )


def _from_config(path: Path, name: str, source: str, is_shipped: bool = False) -> Model:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        spec = spec_of(config["_class_name"])
        return Model(name, source, spec, spec.num_layers(config), is_shipped)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model={name!r}: cannot read {path}: {type(error).__name__}: {error}") from error


def _fetch(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model={name!r} is no folder here, and {file} could not be fetched from the hub: {reason}"
        ) from error
