"""Skips and, per noise level, which of them are on.

Frozen dataclasses on the standard library alone, and the checks of their values, which `config` shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real

MODES = ("residual", "attention")
AXES = (None, "spatial", "temporal")
RULES = ("at_or_below", "at_or_above")


def choice(field: str, value: object, allowed: tuple) -> None:
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


def all_of(kind: type, field: str, value: object) -> tuple:
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
        choice("mode", self.mode, MODES)
        choice("axis", self.axis, AXES)


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
        object.__setattr__(self, "entries", all_of(ScheduleEntry, "entries", self.entries))
        choice("rule", self.rule, RULES)
        sigmas = [entry.sigma for entry in self.entries]
        if not sigmas or any(a <= b for a, b in pairwise(sigmas)):
            raise ValueError(f"entries with sigma={sigmas} are not allowed; list at least one, sigma strictly falling")

    def at(self, sigma: float) -> ScheduleEntry:
        """The entry in force at noise level `sigma` (1 is pure noise)."""
        if self.rule == "at_or_below":
            return next((entry for entry in self.entries if entry.sigma <= sigma), self.entries[-1])
        return next((entry for entry in reversed(self.entries) if entry.sigma >= sigma), self.entries[0])
