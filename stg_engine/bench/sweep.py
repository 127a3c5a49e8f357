"""`stg-engine sweep`: for each layer what skipping it costs, changes and, on the shipped model, does to clips."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from stg_engine.bench.layers import Guided

STEPS, SHIPPED_STEPS, SHIPPED_CLIPS, SHIPPED_PROMPTS = 8, 12, 12, 3
"""Of a run, unless the user says otherwise."""


@dataclass(frozen=True)
class SweepRow:
    """One layer, or no skip at all to compare with. Empty cells (None) do not apply or were not measured.

    model, weights, blocks   its name, "trained" or "random", L
    name, layer     "no guidance", "CFG alone" (both without layer), "layer 6"
    mode, axis, stg_scale, guidance_scale   the guidance; 1 is no CFG
    block_rows, pass_equivalents   of a step by its plan, per video
    seconds         of a guided step of one video, median of `samples` rounds over all rows; `low`, `high` the quartiles
    of_cfg          the same over the first row's in the same round: CFG alone, or no guidance where there is no CFG
    delta           |c - p| / |c|, L2, mean of the rounds, which are spread over noise levels; `_low`, `_high` extremes;
                    of the video where there is audio, too
    delta_of_cfg    |c - p| / |c - u|, the difference of the skip over that of CFG
    clips, steps    that were judged, and of each
    all, shape, color, direction, background   share of clips in which that of the caption holds; `_error` its standard
                    error sqrt(q (1 - q) / (n + 4)) with q = (k + 2) / (n + 4), not 0 where all n clips agree (Agresti
                    and Coull, 1998)
    iou, edge, stray    means of what `stg_engine.demo.reader` says, with their standard errors
    ..._gain        mean over clips of the difference from the first row on the same caption and noise; its `_error`
    kernels         what the blocks ran
    """

    model: str
    weights: str
    blocks: int
    name: str
    layer: int | None
    mode: str | None
    axis: str | None
    stg_scale: float | None
    guidance_scale: float
    block_rows: int
    pass_equivalents: float
    seconds: float
    low: float
    high: float
    of_cfg: float
    of_cfg_low: float
    of_cfg_high: float
    samples: int
    delta: float | None
    delta_low: float | None
    delta_high: float | None
    delta_of_cfg: float | None
    clips: int | None
    steps: int | None
    all: float | None
    all_error: float | None
    all_gain: float | None
    all_gain_error: float | None
    shape: float | None
    shape_error: float | None
    color: float | None
    color_error: float | None
    direction: float | None
    direction_error: float | None
    background: float | None
    background_error: float | None
    iou: float | None
    iou_error: float | None
    iou_gain: float | None
    iou_gain_error: float | None
    edge: float | None
    edge_error: float | None
    edge_gain: float | None
    edge_gain_error: float | None
    stray: float | None
    stray_error: float | None
    stray_gain: float | None
    stray_gain_error: float | None
    kernels: str
    dtype: str
    device: str
    threads: int
    clock_mhz: int | None
    driver: str
    cuda: str
    cudnn: str
    sdpa: str
    torch: str
    triton: str
    diffusers: str
    stg_engine: str
    commit: str
    date: str


GAINS = ("all", "iou", "edge", "stray")
SHARES = ("all", "shape", "color", "direction", "background")


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """The options of the command; None takes the model's default."""

    model: str | None = None
    layers: str = "all"
    mode: str | None = None
    axis: str | None = None
    stg_scale: float | None = None
    guidance_scale: float | None = None
    prompt: str | None = None
    clips: int | None = None
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    out: str = "sweep.csv"
    plot: str | None = None
    force: bool = False
    device: str | None = None
    dtype: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `SweepRequest`, which checks them."""
    add = parser.add_argument
    add("--model", metavar="M", help="pipeline folder, hub id or a case of stg-engine bench (default: shipped)")
    add("--layers", default="all", metavar="L", help="all, or such as 0-9 or 3,5 (default: %(default)s)")
    add("--mode", metavar="MODE", help="residual (STG-R) or attention (STG-A) (default: residual, or the case's)")
    add("--axis", metavar="AXIS", help="spatial or temporal, in models with blocks for each (Latte)")
    add("--stg-scale", type=float, metavar="S", help="skip scale s (default: 1, or the case's)")
    add("--guidance-scale", type=float, metavar="G", help="CFG scale g; 1 or less is off (default: the model's)")
    add("--prompt", metavar="TEXT", help="what a clip of a pipeline shows (the shipped model has captions of its own)")
    add("--clips", type=int, metavar="N", help=f"clips judged per row, shipped model (default: {SHIPPED_CLIPS})")
    add("--steps", type=int, metavar="N", help=f"denoising steps (default: {SHIPPED_STEPS} if shipped, else {STEPS})")
    for size in ("frames", "height", "width"):
        add(f"--{size}", type=int, metavar="N", help="of a pipeline's clip (default: the pipeline's)")
    add("--out", default="sweep.csv", metavar="CSV", help="the rows, written after each layer (default: %(default)s)")
    add("--plot", metavar="PNG", help="cost, delta, accuracy and sharpness over layers; needs matplotlib")
    add("--force", action="store_true", help="overwrite both files")
    add("--device", metavar="D", help="such as cuda, cuda:1, cpu (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32 on cpu, else bfloat16)")


def parse_layers(text: str, count: int) -> list[int]:
    """ "all", "0-9", "3,5", "0-3,9" -> layers in order, each once. ValueError outside 0 to count - 1."""
    layers: set[int] = set()
    for part in [f"0-{count - 1}"] if text == "all" else text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise ValueError(f"layers={text!r} is not allowed; it must be all, or block numbers such as 0-9 or 3,5")
        chosen = range(int(first), int(last or first) + 1)
        if not chosen or chosen[-1] >= count:
            raise ValueError(f"layers={text!r} is not allowed: {part} is empty or outside 0 to {count - 1}")
        layers.update(chosen)
    return sorted(layers)


def standard_error(values: Tensor) -> float | None:
    """Of the mean of [N]; None for fewer than two."""
    return None if len(values) < 2 else values.std().item() / math.sqrt(len(values))


def quality(values: dict[str, Tensor], base: dict[str, Tensor] | None) -> dict[str, Any]:
    """A row's fields of what was measured per clip; `base` is CFG alone on the same clips, None for that itself."""
    fields: dict[str, Any] = {}
    for name, of_clips in values.items():
        seen = of_clips[~of_clips.isnan()]
        if not len(seen):
            continue
        fields[name] = seen.mean().item()
        fields[f"{name}_error"] = standard_error(seen)
        if name in SHARES:
            q = (seen.sum().item() + 2) / (len(seen) + 4)
            fields[f"{name}_error"] = math.sqrt(q * (1 - q) / (len(seen) + 4))
        if base is not None and name in GAINS:
            gains = of_clips - base[name]
            gains = gains[~gains.isnan()]
            fields[f"{name}_gain"] = gains.mean().item() if len(gains) else None
            fields[f"{name}_gain_error"] = standard_error(gains)
    return fields


def cost(result: Guided, baseline: Guided) -> dict[str, Any]:
    """A row's fields of what was measured per round."""
    from stg_engine.bench.timing import quartiles

    ratios = [own / other for own, other in zip(result.seconds, baseline.seconds, strict=True)]
    fields: dict[str, Any] = {
        "block_rows": result.plan.block_rows,
        "pass_equivalents": result.plan.pass_equivalents,
        "samples": len(ratios),
        "kernels": result.kernels,
    }
    fields |= zip(("low", "seconds", "high"), quartiles(result.seconds), strict=True)
    fields |= zip(("of_cfg_low", "of_cfg", "of_cfg_high"), quartiles(ratios), strict=True)
    if result.delta:
        fields |= {"delta": fmean(result.delta), "delta_low": min(result.delta), "delta_high": max(result.delta)}
    if result.delta_of_cfg:
        fields["delta_of_cfg"] = fmean(result.delta_of_cfg)
    return fields


def check_files(request: SweepRequest) -> list[Path]:
    """The files to write. ValueError for a wrong name, a missing folder, a taken name, matplotlib that is missing."""
    from importlib.util import find_spec

    from stg_engine import media

    paths = [Path(request.out)] if request.plot is None else [Path(request.out), Path(request.plot)]
    for option, path, suffix in zip(("out", "plot"), paths, (".csv", ".png"), strict=False):
        if path.suffix.lower() != suffix:
            raise ValueError(f"{option}={str(path)!r}: must be a file name that ends in {suffix}")
        try:
            media.check_writable([path], request.force)
        except ValueError as error:
            raise ValueError(str(error).replace("out:", f"{option}:", 1)) from None
    if request.plot is not None and find_spec("matplotlib") is None:
        raise ValueError(f"plot={request.plot!r} needs matplotlib, which is not installed")
    return paths


def sweep(request: SweepRequest) -> list[SweepRow]:
    """Run it and write the CSV file row by row; returns the rows: CFG alone, no guidance, the layers in order.

    ValueError or TypeError for what is wrong with the request, before anything is computed. KeyboardInterrupt says
    how many rows were written.
    """
    from tqdm import tqdm

    from stg_engine.bench import layers, record
    from stg_engine.bench.cases import CASES
    from stg_engine.config import StepGuidance
    from stg_engine.generate import choose_device, choose_dtype, clip_arguments, load_pipeline, model_to_run
    from stg_engine.settings import Options, choose_setting

    paths = check_files(request)
    case = CASES.get(request.model or "")
    model = model_to_run(request.model) if case is None else layers.model_of_case(case)
    _check_options(request, is_case=case is not None, is_shipped=model.is_shipped)
    skip, g = (None, None) if case is None else (case.config.skips[0], case.guidance_scale or 1.0)
    options = Options(
        stg_scale=request.stg_scale if request.stg_scale is not None or skip is None else skip.scale,
        stg_mode=request.mode if request.mode is not None or skip is None else skip.mode,
        stg_axis=request.axis if request.axis is not None or skip is None else skip.axis,
        guidance_scale=g if request.guidance_scale is None else request.guidance_scale,
    )
    chosen = parse_layers(request.layers, model.num_layers)
    settings = {f"layer {k}": choose_setting(model, replace(options, stg_layers=(k,))) for k in chosen}
    configs = {name: setting.config for name, setting in settings.items() if setting.config is not None}
    if not configs:
        raise ValueError(f"stg_scale={request.stg_scale} is not allowed: without a skip there is nothing to sweep")
    setting = next(iter(settings.values()))
    g = setting.guidance_scale
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)

    steps, specs, pipe = request.steps or (SHIPPED_STEPS if model.is_shipped else STEPS), [], None
    if case is not None:
        recorded = layers.steps_of_case(case, g, device, dtype)
    else:
        pipe = load_pipeline(model, device, dtype)
        if model.is_shipped:
            specs = layers.captions_of(request.clips or SHIPPED_CLIPS, 0)
        prompts = (
            [request.prompt] if request.prompt else [spec.caption for spec in layers.captions_of(SHIPPED_PROMPTS, 0)]
        )
        sizes = {"frames": request.frames, "height": request.height, "width": request.width}
        call = clip_arguments({**sizes, "fps": None, "steps": steps}, model, pipe)
        recorded = layers.steps_of_run(pipe, setting, call, prompts)

    plain = {layers.CFG: StepGuidance()} if g > 1 else {}
    plain[layers.NO_GUIDANCE] = StepGuidance()
    guidances = plain | {name: config.at() for name, config in configs.items()}
    rounds = layers.measure(recorded, next(iter(configs.values())), guidances)
    *_, results = tqdm(rounds, "cost and delta", max(layers.SAMPLES, len(recorded)), disable=None)

    common = {
        "model": "shipped" if model.is_shipped else model.name,
        "weights": "random" if case is not None else "trained",
        "blocks": model.num_layers,
        "dtype": str(dtype).removeprefix("torch."),
        **record.environment(device),
    }
    rows: list[SweepRow] = []
    base: dict[str, Tensor] | None = None
    try:
        for name in tqdm(guidances, "clips", disable=None if specs else True):
            config = configs.get(name)
            cells: dict[str, Any] = dict.fromkeys(field.name for field in fields(SweepRow)) | common
            cells |= {"name": name, "guidance_scale": 1.0 if name == layers.NO_GUIDANCE else g}
            if config is not None:
                cells |= {"layer": config.layers[0], "mode": config.mode, "axis": config.axis}
                cells["stg_scale"] = config.scale
            cells |= cost(results[name], results[next(iter(guidances))])
            if specs:
                values = layers.judge(pipe, specs, steps, cells["guidance_scale"], config)
                cells |= {"clips": len(specs), "steps": steps, **quality(values, base)}
                base = values if base is None else base
            row = SweepRow(**cells)
            if not rows:
                paths[0].unlink(missing_ok=True)
            record.append(paths[0], [row])
            rows.append(row)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(rows)} of {len(guidances)} rows are in {paths[0]}" if rows else "") from None
    return rows


def _check_options(request: SweepRequest, *, is_case: bool, is_shipped: bool) -> None:
    """ValueError for an option that would have no effect, for a number out of range, for a prompt that is missing."""
    sizes = ("frames", "height", "width")
    idle = ("prompt", "clips", "steps", *sizes) if is_case else sizes if is_shipped else ("clips",)
    kind = "a case, which has inputs of its own" if is_case else "the shipped model, which knows one size"
    kind = kind if is_case or is_shipped else "a pipeline: only the shipped model's clips can be judged"
    for name in idle:
        if getattr(request, name) is not None:
            raise ValueError(f"{name}={getattr(request, name)!r} has no effect on {kind}")
    for name, low in (("clips", 2), ("steps", 1), *((size, 1) for size in sizes)):
        value = getattr(request, name)
        if value is not None and value < low:
            raise ValueError(f"{name}={value} is not allowed; it must be at least {low}")
    if request.prompt is not None and not request.prompt.strip():
        raise ValueError(f"prompt={request.prompt!r} is not allowed; say what the clip shows")
    if request.prompt is None and not is_case and not is_shipped:
        raise ValueError("prompt: say what the clip shows with --prompt; only the shipped model has captions")
