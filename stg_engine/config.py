"""What the user asks for: which layers are skipped, how strongly, and in which steps.

Frozen dataclasses on the standard library alone. A wrong value raises `ValueError` naming field, value and choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

MODES = ("residual", "attention")
AXES = (None, "spatial", "temporal")
RULES = ("at_or_below", "at_or_above")
RESCALE_OVER = ("sample", "batch")
ARITHMETIC = ("float32", "model")


def _choice(field: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not allowed; choose one of {', '.join(map(repr, allowed))}")


def number(field: str, value: object, low: float, high: float = math.inf) -> float:
    """`value` as a float. Raises `ValueError` that names `field` unless it is a finite number in [low, high]."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    try:
        result = float(value) if is_number else math.nan  # type: ignore[arg-type]
    except OverflowError:
        result = math.inf
    if not low <= result <= high or math.isinf(result):
        bounds = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        hint = f"; pass float({field})" if hasattr(value, "item") else ""
        raise ValueError(f"{field}={value!r} is not allowed; it must be a finite number {bounds}{hint}")
    return result


def _all_of(kind: type, field: str, value: object) -> tuple:
    if not isinstance(value, list | tuple) or not all(isinstance(item, kind) for item in value):
        raise ValueError(f"{field}={value!r} is not allowed; it must be a tuple of {kind.__name__}(...)")
    return tuple(value)


def _layers(value: object, *, may_be_empty: bool = False) -> tuple[int, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"layers={value!r} is not allowed; it must be a sequence of block indices such as (19,)")
    layers = tuple(value)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or layer < 0:
            raise ValueError(f"layers={layers!r} holds {layer!r}; block indices are integers, 0-based, not negative")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers={layers!r} holds a duplicate; name each block once")
    if not layers and not may_be_empty:
        raise ValueError("layers=() is empty; name at least one block, or use scale=0.0 to switch the guidance off")
    return tuple(sorted(map(int, layers)))


@dataclass(frozen=True)
class Skip:
    """One weak prediction p: the conditional pass with `layers` skipped, subtracted with `scale`.

    layers  block indices, 0-based, in the order in which the model runs its blocks
    scale   s >= 0 in `... + s (c - p)`; 0 leaves the branch out
    mode    "residual" (STG-R, arXiv 2411.18664 Eq. 14-15): the block's output is its input;
            "attention" (STG-A, Eq. 17): self-attention returns V before the output projection
    axis    "spatial" or "temporal" in models with factorised attention, else None
    """

    layers: tuple[int, ...]
    scale: float = 1.0
    mode: str = "residual"
    axis: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _layers(self.layers))
        object.__setattr__(self, "scale", number("scale", self.scale, 0.0))
        _choice("mode", self.mode, MODES)
        _choice("axis", self.axis, AXES)


@dataclass(frozen=True)
class ScheduleEntry:
    """Settings of one noise level. `guidance_scale=None` leaves the caller's; `layers` may be empty at scale 0."""

    sigma: float
    layers: tuple[int, ...] = ()
    scale: float = 0.0
    rescale: float = 0.0
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", number("sigma", self.sigma, 0.0, 1.0))
        object.__setattr__(self, "scale", number("scale", self.scale, 0.0))
        object.__setattr__(self, "rescale", number("rescale", self.rescale, 0.0, 1.0))
        object.__setattr__(self, "layers", _layers(self.layers, may_be_empty=self.scale == 0.0))
        if self.guidance_scale is not None:
            object.__setattr__(self, "guidance_scale", number("guidance_scale", self.guidance_scale, 0.0))


@dataclass(frozen=True)
class STGSchedule:
    """Settings per noise level, and the rule that maps a sigma to an entry.

    entries  strictly falling in sigma
    rule     "at_or_below": the first listed entry with entry.sigma <= sigma, else the last (Lightricks/LTX-Video);
             "at_or_above": the entry with the smallest entry.sigma >= sigma, else the first (ComfyUI-LTXVideo, LTX-2).
             The same table means another schedule under the other rule, so there is no default.
    """

    entries: tuple[ScheduleEntry, ...]
    rule: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", _all_of(ScheduleEntry, "entries", self.entries))
        _choice("rule", self.rule, RULES)
        sigmas = [entry.sigma for entry in self.entries]
        if not sigmas or any(a <= b for a, b in pairwise(sigmas)):
            raise ValueError(f"entries with sigma={sigmas} are not allowed; list at least one, sigma strictly falling")

    def at(self, sigma: float) -> ScheduleEntry:
        """The entry in force at noise level `sigma` (1 is pure noise)."""
        if self.rule == "at_or_below":
            return next((entry for entry in self.entries if entry.sigma <= sigma), self.entries[-1])
        return next((entry for entry in reversed(self.entries) if entry.sigma >= sigma), self.entries[0])


@dataclass(frozen=True)
class StepGuidance:
    """What one denoising step does. Without a weak branch there is no rescale either: the step is plain guidance."""

    skips: tuple[Skip, ...] = ()
    rescale: float = 0.0
    guidance_scale: float | None = None
    modality_scale: float = 1.0

    @property
    def is_plain(self) -> bool:
        """True if the step is the caller's own guidance: nothing of the setting acts in it."""
        return not self.weak and self.guidance_scale is None

    @property
    def weak(self) -> tuple[tuple[str, float], ...]:
        """The weak branches in row order, each with its weight w in `... + w (c - p)`."""
        skips = zip(self.names, (skip.scale for skip in self.skips), strict=True)
        return (*skips, *([] if self.modality_scale == 1 else [("modality", self.modality_scale - 1)]))

    @property
    def names(self) -> tuple[str, ...]:
        """Branch names of `skips`, in order: skip, skip2, ..."""
        return tuple("skip" if i == 0 else f"skip{i + 1}" for i in range(len(self.skips)))


@dataclass(frozen=True)
class STGConfig:
    """Spatiotemporal Skip Guidance: `u + g (c - u) + sum_i s_i (c - p_i)`, then an optional std-rescale.

    layers, scale, mode, axis   the first skip branch, see `Skip`
    rescale       r in [0, 1]: the result is multiplied by `r std(c) / std(result) + 1 - r`; 0 is off
    start, stop   the skips are on while start <= progress < stop, progress = step index / number of steps
    extra_skips   further skip branches
    schedule      settings per sigma instead of layers, scale, rescale, start, stop and extra_skips
    cfg_star      u is first multiplied by <c, u> / |u|^2 per sample (CFG-star, Lightricks/LTX-Video), in steps with
                  skips or a scheduled guidance scale
    rescale_over  "sample": the std of each video on its own; "batch": one std over the whole batch (STGuidance)
    arithmetic    "float32", or "model": combine in the transformer's dtype (Lightricks/LTX-Video: bfloat16)
    modality_scale  mu >= 1 in `... + (mu - 1)(c - m)`, in the steps in which the skips are on: m is c without attention
                  between video and audio (LTX-2); 1 is off

    Raises `ValueError` for a value out of range, an empty or duplicate layer list, an unknown choice.
    """

    layers: tuple[int, ...] = ()
    scale: float = 1.0
    mode: str = "residual"
    axis: str | None = None
    rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    extra_skips: tuple[Skip, ...] = ()
    schedule: STGSchedule | None = None
    cfg_star: bool = False
    rescale_over: str = "sample"
    arithmetic: str = "float32"
    modality_scale: float = 1.0

    def __post_init__(self) -> None:
        _choice("mode", self.mode, MODES)
        _choice("axis", self.axis, AXES)
        _choice("rescale_over", self.rescale_over, RESCALE_OVER)
        _choice("arithmetic", self.arithmetic, ARITHMETIC)
        if not isinstance(self.cfg_star, bool):
            raise ValueError(f"cfg_star={self.cfg_star!r} is not allowed; choose one of True, False")
        object.__setattr__(self, "modality_scale", number("modality_scale", self.modality_scale, 1.0))
        if self.schedule is not None:
            self._check_schedule_stands_alone()
            return
        first = Skip(self.layers, self.scale, self.mode, self.axis)
        object.__setattr__(self, "layers", first.layers)
        object.__setattr__(self, "scale", first.scale)
        object.__setattr__(self, "rescale", number("rescale", self.rescale, 0.0, 1.0))
        object.__setattr__(self, "start", number("start", self.start, 0.0, 1.0))
        object.__setattr__(self, "stop", number("stop", self.stop, 0.0, 1.0))
        if self.start >= self.stop:
            raise ValueError(f"start={self.start} is not allowed; it must be below stop={self.stop}")
        object.__setattr__(self, "extra_skips", _all_of(Skip, "extra_skips", self.extra_skips))
        weak = [(skip.layers, skip.mode, skip.axis) for skip in self.skips]
        if len(set(weak)) != len(weak):
            raise ValueError(f"extra_skips={self.extra_skips!r} repeats a branch; add the scales up instead")

    def _check_schedule_stands_alone(self) -> None:
        if not isinstance(self.schedule, STGSchedule):
            raise ValueError(f"schedule={self.schedule!r} is not allowed; it must be an STGSchedule")
        per_entry = ("layers", "scale", "rescale", "start", "stop", "extra_skips")
        for field in fields(self):
            if field.name in per_entry and getattr(self, field.name) != field.default and field.default is not MISSING:
                value = getattr(self, field.name)
                raise ValueError(f"{field.name}={value!r} is not allowed beside a schedule; set it in the entries")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> STGConfig:
        """A published setting by name (see `stg_engine.presets`); `changes` replace fields of it."""
        from stg_engine.presets import preset

        return preset(name, **changes)

    @property
    def skips(self) -> tuple[Skip, ...]:
        """All skip branches, whatever their scale; of a schedule, those of every entry that has one."""
        if self.schedule is None:
            return (Skip(self.layers, self.scale, self.mode, self.axis), *self.extra_skips)
        return tuple(
            dict.fromkeys(Skip(e.layers, e.scale, self.mode, self.axis) for e in self.schedule.entries if e.scale > 0)
        )

    @property
    def is_on(self) -> bool:
        """True if there are steps with a weak branch."""
        return self.modality_scale != 1 or any(skip.scale > 0 for skip in self.skips)

    @property
    def needs_progress(self) -> bool:
        """True if the steps differ by progress, so that a loop must say where it is."""
        return (self.start, self.stop) != (0.0, 1.0)

    def at(self, progress: float | None = None, sigma: float | None = None) -> StepGuidance:
        """The guidance of one step. Raises `ValueError` if the setting needs `progress` or `sigma` and it is None."""
        if sigma is not None:
            sigma = number("sigma", sigma, 0.0, 1.0)
        if progress is not None and not 0 <= (progress := number("progress", progress, 0.0)) < 1:
            raise ValueError(f"progress={progress} is not allowed; it is step index / number of steps, 0 to below 1")
        if self.schedule is not None:
            if sigma is None:
                raise ValueError("sigma=None is not allowed: this setting has a schedule; pass the step's sigma")
            return self.of_entry(self.schedule.at(sigma))
        if self.needs_progress:
            if progress is None:
                raise ValueError(
                    f"progress=None is not allowed: start={self.start}, stop={self.stop} need step index / steps"
                )
            if not self.start <= progress < self.stop:
                return StepGuidance()
        return self._active(self.skips, self.rescale)

    def of_entry(self, entry: ScheduleEntry) -> StepGuidance:
        """The guidance of a schedule's entry."""
        skips = (Skip(entry.layers, entry.scale, self.mode, self.axis),) if entry.scale > 0 else ()
        return self._active(skips, entry.rescale, entry.guidance_scale)

    def _active(self, skips: tuple[Skip, ...], rescale: float, guidance_scale: float | None = None) -> StepGuidance:
        step = StepGuidance(tuple(s for s in skips if s.scale > 0), rescale, guidance_scale, self.modality_scale)
        return step if step.weak else replace(step, rescale=0.0)
