"""ComfyUI-LTXVideo's sigma-dependent guidance (`presets/stg_advanced_presets.json`, node STGGuiderAdvanced) as configs.

A preset holds lists of one length: from `sigmas[i]` down to the next smaller one, steps use entry i of the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stg_engine.config import ScheduleEntry, STGConfig, STGSchedule
from stg_engine.presets import preset
from stg_engine.schedule import number

FILE = "presets/stg_advanced_presets.json"
LISTS = ("sigmas", "cfg_values", "stg_scale_values", "stg_rescale_values", "stg_layers_indices")
FIELDS = ("name", "skip_steps_sigma_threshold", "cfg_star_rescale", *LISTS)


def read_preset(source: str | Path | Mapping[str, Any], name: str | None = None) -> STGConfig:
    """A preset as `STGConfig`: attention skips, combined in x0, rule "at_or_above", zero-init above the threshold.

    source  the JSON file, the node package's folder, or one preset as a dict, whose lists may be the node's strings
    name    which preset of a file

    Raises `ValueError` that names the preset, the field and what is allowed.
    """
    if isinstance(source, Mapping):
        return _config(source, f"preset {source.get('name', '')!r}")
    presets = read_presets(source)
    if name not in presets:
        raise ValueError(f"name={name!r} is not a preset in {source}; choose one of {', '.join(presets)}")
    return presets[name]


def read_presets(source: str | Path) -> dict[str, STGConfig]:
    """All presets of a JSON file or of the node package's folder, but "Custom", whose values live in the node."""
    path = Path(source)
    if path.is_dir():
        path = next((path / file for file in (FILE, Path(FILE).name) if (path / file).is_file()), path / FILE)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    if not isinstance(found, list) or not all(
        isinstance(item, dict) and isinstance(item.get("name"), str) for item in found
    ):
        raise ValueError(f"{path} holds no list of presets, each an object with a name")
    return {item["name"]: _config(item, f"{path}: preset {item['name']!r}") for item in found if set(item) != {"name"}}


def _config(data: Mapping[str, Any], where: str) -> STGConfig:
    missing = [field for field in FIELDS[1:] if field not in data]
    unknown = [field for field in data if field not in FIELDS]
    if missing or unknown:
        reason = f"has no {', '.join(missing)}" if missing else f"holds {', '.join(map(repr, unknown))}"
        raise ValueError(f"{where} {reason}; it must hold {', '.join(FIELDS[1:])}")
    lists = {field: _list(data[field], f"{where}: {field}") for field in LISTS}
    lengths = {len(values) for values in lists.values()}
    if len(lengths) > 1 or 0 in lengths:
        sizes = ", ".join(f"{field} {len(values)}" for field, values in lists.items())
        raise ValueError(f"{where} has lists of several lengths ({sizes}); they must be equal and not empty")
    try:
        entries = [
            ScheduleEntry(sigma, layers, scale, rescale, guidance_scale=g)
            for sigma, g, scale, rescale, layers in zip(*lists.values(), strict=True)
        ]
        for entry in entries:
            if entry.guidance_scale is not None and entry.guidance_scale < 1:
                raise ValueError(f"cfg_values holds {entry.guidance_scale:g}; it must be 1 (off) or more")
        if all(entry.sigma < 1 for entry in entries):  # there a sigma above all listed ones takes the last entry
            entries.append(replace(entries[-1], sigma=1.0))
        entries.sort(key=lambda entry: -entry.sigma)
        return preset(
            "comfyui",
            schedule=STGSchedule(tuple(entries), "at_or_above"),
            cfg_star=data["cfg_star_rescale"],
            zero_init=min(number("skip_steps_sigma_threshold", data["skip_steps_sigma_threshold"], 0.0), 1.0),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _list(value: Any, where: str) -> list[Any]:
    try:
        value = json.loads(f"[{value}]") if isinstance(value, str) else value
    except ValueError:
        value = None
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is no list; it must be one, or the node's comma-separated text")
    return list(value)
