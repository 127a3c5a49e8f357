"""`stg-engine generate`: a prompt becomes a clip, a contact sheet and a metadata file, all of them or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

import stg_engine
from stg_engine import demo, env, media
from stg_engine.arguments import (
    TEXT_TO_VIDEO,
    call_arguments,
    check_pipeline,
    check_size,
    default_of,
    engine_config,
    guidance_arguments,
    models_of,
)
from stg_engine.compare import Comparison, compare, noise_levels, recorded_steps, steps_of, synchronize
from stg_engine.plan import Plan, Plans
from stg_engine.reference import recorded_calls
from stg_engine.settings import Model, Options, Setting, choose_setting, find_model, kind_of, pipeline_class

_CLIP = ("height", "width", "frames", "fps", "steps")
Warn = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request(Options):
    """The options of the command; None takes the model's default."""

    out: str
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: int | None = None
    dtype: str | None = None
    device: str | None = None
    execution: str = "batched"
    kernels: str = "auto"
    max_rows: int | None = None
    graph: bool = False
    compile: str | None = None
    compare: bool = False
    force: bool = False


@dataclass(frozen=True)
class Clip:
    """One run of the pipeline: uint8 [F, H, W, 3], and the seconds of its steps but the first, which warms up."""

    label: str
    frames: np.ndarray
    seconds: float
    step_seconds: list[float]
    report: str = ""
    audio: media.Audio | None = None

    @property
    def seconds_per_step(self) -> float | None:
        """Median; None for a run of one step."""
        return median(self.step_seconds) if self.step_seconds else None


def generate(request: Request, warn: Warn) -> str:
    """Run the request and write its files; returns what to tell the user.

    ValueError or TypeError for what is wrong with the request, mostly before anything is computed; FloatingPointError
    for a clip of NaN. After any exception there is no new file.
    """
    paths = media.output_paths(request.out)
    media.check_writable(paths, request.force)
    model = model_to_run(request.model)
    if request.prompt is None and model.is_shipped:
        request = replace(request, prompt=demo.SETTING.prompt)
    if not (request.prompt or "").strip():
        raise ValueError(f"prompt={request.prompt!r} is not allowed; say what the clip shows")
    setting = choose_setting(model, request)
    plan = setting.plan(model)
    if request.compare and model.spec.links:
        raise ValueError(
            f"compare: {model.spec.family} predicts video and audio; its pipeline's calls are not compared here"
        )
    if request.compare and setting.config is None:
        raise ValueError("compare: without a skip branch (--stg-scale 0) there is nothing to compare")
    if request.negative_prompt and setting.guidance_scale <= 1:
        warn(f"the negative prompt has no effect at guidance scale {setting.guidance_scale:g}; it needs more than 1")

    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    pipe = load_pipeline(model, device, dtype)
    call = clip_arguments({name: getattr(request, name) for name in _CLIP}, model, pipe)
    if model.is_shipped:
        _warn_of_unknown_words(pipe.tokenizer, f"{request.prompt} {request.negative_prompt or ''}", warn)

    with _attached(pipe, setting, request):
        pass  # what the engine refuses, it refuses here, not after minutes of the other runs
    clips, comparison = _run_all(pipe, setting, request, call)
    size = _size(request, model, pipe, clips[-1])
    if request.frames not in (None, size["frames"]):
        warn(f"frames={request.frames}: {type(pipe).__name__} made {size['frames']} frames")
    if comparison is not None and not comparison.is_equal:
        warn("the engine's prediction differs from that of plain passes by more than rounding; please report this")
    metadata = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: value for name, value in asdict(request).items() if name in ("prompt", "negative_prompt", "seed")},
        **size,
        "model": model.name,
        "pipeline": type(pipe).__name__,
        "preset": setting.preset,
        "guidance_scale": setting.guidance_scale,
        "stg": None if setting.config is None else asdict(setting.config),
        "execution": request.execution,
        "kernels": request.kernels,
        "max_rows": request.max_rows,
        "graph": request.graph,
        "compile": request.compile,
        "plan": _describe_plan(plan),
        "device": str(device),
        "device_name": env.device_name(str(device)),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"stg_engine": stg_engine.__version__, **env.versions()},
        "environment": env.variables(),
        "runs": [
            {"label": clip.label, "seconds": clip.seconds, "seconds_per_step": clip.seconds_per_step} for clip in clips
        ],
        "seconds": clips[-1].seconds,
        "seconds_per_step": clips[-1].seconds_per_step,
        "report": clips[-1].report,
        "compare": None if comparison is None else {**asdict(comparison), "speedup": comparison.speedup},
    }
    _write(paths, request.force, clips, metadata)
    return _summary(paths, plan, clips, comparison, f"{device}, {metadata['dtype']}")


def model_to_run(name: str | None) -> Model:
    """`find_model` of a pipeline that can be called with a prompt. ValueError for another, before its weights load."""
    pipeline = pipeline_class(name)
    if pipeline is not None:
        check_pipeline(str(name), pipeline)
    model = find_model(name)
    if model.source is None:
        raise ValueError(f"model={model.name!r} is a published shape without weights; name a folder or a hub id")
    return model


def _run_all(
    pipe: Any, setting: Setting, request: Request, call: dict[str, Any]
) -> tuple[list[Clip], Comparison | None]:
    """The clips in the order of the contact sheet's rows, the one asked for last; and the comparison if asked for."""
    g, config = setting.guidance_scale, setting.config
    if not request.compare or config is None:
        return [_run(pipe, request, call, setting)], None
    clips = [_run(pipe, request, call, replace(setting, config=None, guidance_scale=1.0))]
    if g > 1:
        clips.append(_run(pipe, request, call, replace(setting, config=None)))
    sigmas = noise_levels(pipe, config)  # of the runs above, whose steps are the same
    wanted = recorded_steps(config, sigmas)
    ticks: list[float] = []
    with recorded_calls(models_of(pipe), lambda: len(ticks) if len(ticks) in wanted else None) as calls:
        clips.append(_run(pipe, request, call, setting, ticks))
    return clips, compare(config, steps_of(calls, sigmas, g), **_execution(request))


def _run(pipe: Any, request: Request, call: dict[str, Any], setting: Setting, ticks: list[float] | None = None) -> Clip:
    """One call of the pipeline, with the engine attached if there is a config; `ticks` gets the end of each step."""
    device, ticks, label = pipe._execution_device, [] if ticks is None else ticks, _label(setting)

    def tick(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        synchronize(device)
        ticks.append(time.perf_counter())
        return {}

    pipe.set_progress_bar_config(desc=" ".join(label.split()), disable=None)  # None: only where stderr is a terminal
    start = time.perf_counter()
    with _attached(pipe, setting, request) as engine:
        output = pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or "",
            generator=torch.Generator("cpu").manual_seed(request.seed),  # the same noise on every device
            output_type="np",
            callback_on_step_end=tick,
            **guidance_arguments(pipe, setting),
            **call,
        )
        report = "" if engine is None else str(engine.report())
    seconds = time.perf_counter() - start
    step_seconds = [after - before for before, after in pairwise(ticks)]
    return Clip(label, media.to_uint8(output.frames[0]), seconds, step_seconds, report, _audio(pipe, output))


def _audio(pipe: Any, output: Any) -> media.Audio | None:
    if getattr(output, "audio", None) is None:
        return None
    return media.Audio(output.audio[0].float().cpu().numpy(), pipe.vocoder.config.output_sampling_rate)


def _attached(pipe: Any, setting: Setting, request: Request) -> AbstractContextManager[stg_engine.Engine | None]:
    if setting.config is None:
        return nullcontext()
    return stg_engine.attach(pipe, engine_config(pipe, setting.config), **_execution(request))


def _execution(request: Request) -> dict[str, Any]:
    """Those of the options that `attach` and `Denoiser` take beside a config."""
    return {name: getattr(request, name) for name in ("execution", "max_rows", "kernels", "graph", "compile")}


def load_pipeline(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline on `device`. ValueError if it cannot be loaded."""
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model.source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={model.name!r} cannot be loaded as a pipeline: {error}") from error
    return pipe.to(device)


def choose_device(name: str | None) -> torch.device:
    """That device; None: CUDA where there is one, else the CPU. ValueError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        count = torch.cuda.device_count()
        known = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise ValueError(f"device={name!r} is not available; here: {known}") from error
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """That dtype; None: float32 on a CPU, else bfloat16."""
    return getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"))


def clip_arguments(options: Mapping[str, int | None], model: Model, pipe: Any) -> dict[str, Any]:
    """height, width, frames, fps, steps that the user typed, or the shipped model has, as the pipeline's arguments."""
    if model.is_shipped:
        options = {name: getattr(demo.SETTING, name) if value is None else value for name, value in options.items()}
    call = call_arguments(pipe, options)
    check_size(pipe, call)
    return call


def _size(request: Request, model: Model, pipe: Any, clip: Clip) -> dict[str, Any]:
    """height, width, frames, fps, steps of a finished clip."""
    frames, height, width = clip.frames.shape[:3]
    fps = request.fps or (demo.SETTING.fps if model.is_shipped else default_of(pipe, "fps"))
    fps = fps or TEXT_TO_VIDEO[type(pipe).__name__].fps
    return {"height": height, "width": width, "frames": frames, "fps": fps, "steps": pipe.num_timesteps}


def _warn_of_unknown_words(tokenizer: Any, text: str, warn: Warn) -> None:
    def is_unknown(word: str) -> bool:
        return tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids

    unknown = list(dict.fromkeys(filter(is_unknown, text.split())))
    if unknown:
        pieces = {piece.lstrip("▁") for piece in tokenizer.get_vocab() if piece not in tokenizer.all_special_tokens}
        known = ", ".join(sorted(filter(None, pieces)))
        warn(f"the shipped model does not know {', '.join(map(repr, unknown))}; it knows: {known}")


def _label(setting: Setting) -> str:
    g, config = setting.guidance_scale, setting.config
    cfg = f"CFG {g:g}" if g > 1 else ""
    if config is None:
        return cfg or "no guidance"
    if config.schedule is not None:
        return f"CFG + STG\n({setting.preset})"
    skips = [f"STG {skip.scale:g}" for skip in config.skips]
    details = "; ".join(f"{kind_of(skip)}, layers {','.join(map(str, skip.layers))}" for skip in config.skips)
    return f"{' + '.join([cfg, *skips] if cfg else skips)}\n({details})"


def _describe_plan(plan: Plan | Plans) -> dict[str, Any]:
    cost = [p.pass_equivalents for p in plan] if isinstance(plan, Plans) else plan.pass_equivalents
    return {"text": str(plan), "pass_equivalents": cost}


def _write(paths: list[Path], force: bool, clips: list[Clip], metadata: dict[str, Any]) -> None:
    with media.all_or_nothing(paths, force) as (mp4, png, data):
        height, width = media.write_mp4(mp4, clips[-1].frames, metadata["fps"], clips[-1].audio)
        title = f"{metadata['prompt']} (seed {metadata['seed']}, {metadata['steps']} steps)"
        media.contact_sheet([(clip.label, clip.frames) for clip in clips], title).save(png, format="PNG")
        media.write_json(data, {**metadata, "mp4": {"height": height, "width": width}})


def _summary(
    paths: list[Path], plan: Plan | Plans, clips: list[Clip], comparison: Comparison | None, where: str
) -> str:
    lines = [str(plan), ""]
    for clip in clips:
        step = "" if clip.seconds_per_step is None else f", {clip.seconds_per_step:.4f} s per step"
        lines.append(f"{' '.join(clip.label.split())}: {clip.seconds:.1f} s{step}")
    lines[-1] += f" ({where})"
    if comparison is not None:
        lines.append(str(comparison))
    return "\n".join([*lines, f"wrote {', '.join(map(str, paths))}"])
