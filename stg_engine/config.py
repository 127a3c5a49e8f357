"""What the user asks for: which layers are skipped, how strongly, in which steps, and how the predictions combine.

Frozen dataclasses on the standard library alone. A wrong value raises `ValueError` naming field, value and choices.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from stg_engine.schedule import AXES, MODES, ScheduleEntry, Skip, STGSchedule, all_of, choice, number

__all__ = ["MODES", "AudioGuidance", "STGConfig", "STGSchedule", "ScheduleEntry", "Skip", "StepGuidance", "number"]

RESCALE_OVER = ("sample", "batch")
ARITHMETIC = ("float32", "model")
WEAK_PASSES = ("prompt", "negative_prompt", "uncond")
SPACES = ("model", "x0")


@dataclass(frozen=True)
class AudioGuidance:
    """What is another for the audio than for the video (LTX-2); None is the video's value.

    guidance_scale   g of the audio
    scale            s of the audio, for a setting with one skip; 0 only takes its difference out of the audio, whose
                     layers stay skipped for the sake of the video
    modality_scale   mu of the audio in `(mu - 1)(c - m)`, m the pass whose modalities are isolated
    rescale          r of the audio
    """

    guidance_scale: float | None = None
    scale: float | None = None
    modality_scale: float | None = None
    rescale: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, high = getattr(self, field.name), 1.0 if field.name == "rescale" else math.inf
            low = 1.0 if field.name == "modality_scale" else 0.0
            if value is not None:
                object.__setattr__(self, field.name, number(f"audio.{field.name}", value, low, high))


@dataclass(frozen=True)
class StepGuidance:
    """What one denoising step does.

    skips, rescale, guidance_scale   those in force; None leaves the guidance scale to the caller
    modality_scale, weak_pass        the config's, see `STGConfig`
    audio                            what is another for the audio in this step
    is_zero                          no pass runs: the step's x0 is 0 (`STGConfig.zero_init`)
    """

    skips: tuple[Skip, ...] = ()
    rescale: float = 0.0
    guidance_scale: float | None = None
    modality_scale: float = 1.0
    weak_pass: str = "prompt"
    audio: AudioGuidance | None = None
    is_zero: bool = False

    @property
    def is_plain(self) -> bool:
        """True if the step is the caller's own guidance: nothing of the setting acts in it."""
        acts = self.is_guided or self.guidance_scale is not None or self.rescale or self.audio is not None
        return not acts and not self.is_zero

    @property
    def is_guided(self) -> bool:
        """True if there is a weak pass: a branch of its own, or uncond."""
        return bool(self.skips) or self.modality_scale != 1

    @property
    def needs_uncond(self) -> bool:
        """True if the skips act through CFG, so that there must be an uncond branch."""
        return bool(self.skips) and self.weak_pass != "prompt"

    @property
    def weak(self) -> tuple[tuple[str, float], ...]:
        """The weak branches in row order, each with its weight w in `... + w (c - p)`; a weak uncond is none."""
        skips = zip(self.names, (skip.scale for skip in self.skips), strict=False)
        return (*skips, *([] if self.modality_scale == 1 else [("modality", self.modality_scale - 1)]))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the branches that `skips` add, in order: skip, skip2, ...; none where uncond itself is weak."""
        if self.weak_pass == "uncond":
            return ()
        return tuple("skip" if i == 0 else f"skip{i + 1}" for i in range(len(self.skips)))


@dataclass(frozen=True)
class STGConfig:
    """Spatiotemporal Skip Guidance: `u + g (c - u) + sum_i s_i (c - p_i)`, then an optional std-rescale.

    layers, scale, mode, axis   the first skip branch, see `Skip`
    rescale       r in [0, 1]: the result is multiplied by `r std(c) / std(result) + 1 - r`; 0 is off
    start, stop   the skips are on while start <= progress < stop, progress = step index / number of steps
    extra_skips   further skip branches
    schedule      settings per sigma instead of layers, scale, rescale, start, stop and extra_skips
    weak_pass     the pass that skips. "prompt": one more pass on the prompt, as in the paper; "negative_prompt": one
                  more on the negative prompt, subtracted from q = u + g (c - u): `q + sum_i s_i (q - p_i)` (STGuidance
                  for Wan 2.1); "uncond": uncond itself, no further pass, its scale is 1 (on) or 0 (off) (WanVideoSLG,
                  Wan2GP, KJNodes). The last two act through CFG and need it
    space         "model": predictions are combined as the model makes them; "x0": as x0 = x - sigma v, per token
                  (LTX-2, ComfyUI), another result where rescale or cfg_star is on; models that predict a velocity
    cfg_star      u is first multiplied by <c, u> / |u|^2 per sample (CFG-star, Lightricks/LTX-Video), in steps with
                  skips or a scheduled guidance scale
    zero_init     in steps with a sigma above it no pass runs and x0 is 0 (ComfyUI-LTXVideo); 1 is off
    rescale_over  "sample": the std of each video on its own; "batch": one std over the whole batch (STGuidance)
    rescale_cfg   rescale in steps without skips, too (STGuidance, LTX-2; not Lightricks/LTX-Video)
    arithmetic    "float32", or "model": combine in the transformer's dtype (Lightricks/LTX-Video: bfloat16)
    modality_scale  mu >= 1 in `... + (mu - 1)(c - m)`, in the steps in which the skips are on: m is c without attention
                  between video and audio (LTX-2); 1 is off
    audio         what is another for the audio (LTX-2)

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
    weak_pass: str = "prompt"
    space: str = "model"
    cfg_star: bool = False
    zero_init: float = 1.0
    rescale_over: str = "sample"
    rescale_cfg: bool = False
    arithmetic: str = "float32"
    modality_scale: float = 1.0
    audio: AudioGuidance | None = None

    def __post_init__(self) -> None:
        choice("mode", self.mode, MODES)
        choice("axis", self.axis, AXES)
        choice("rescale_over", self.rescale_over, RESCALE_OVER)
        choice("arithmetic", self.arithmetic, ARITHMETIC)
        choice("weak_pass", self.weak_pass, WEAK_PASSES)
        choice("space", self.space, SPACES)
        for field, value in (("cfg_star", self.cfg_star), ("rescale_cfg", self.rescale_cfg)):
            if not isinstance(value, bool):
                raise ValueError(f"{field}={value!r} is not allowed; choose one of True, False")
        object.__setattr__(self, "zero_init", number("zero_init", self.zero_init, 0.0, 1.0))
        object.__setattr__(self, "modality_scale", number("modality_scale", self.modality_scale, 1.0))
        if self.space == "x0" and self.arithmetic == "model":
            raise ValueError("arithmetic='model' is not allowed with space='x0', whose codes work in float32")
        if self.schedule is not None:
            self._check_schedule_stands_alone()
        else:
            self._check_fields()
        self._check_weak_pass()
        self._check_audio()

    def _check_fields(self) -> None:
        first = Skip(self.layers, self.scale, self.mode, self.axis)
        object.__setattr__(self, "layers", first.layers)
        object.__setattr__(self, "scale", first.scale)
        object.__setattr__(self, "rescale", number("rescale", self.rescale, 0.0, 1.0))
        object.__setattr__(self, "start", number("start", self.start, 0.0, 1.0))
        object.__setattr__(self, "stop", number("stop", self.stop, 0.0, 1.0))
        if self.start >= self.stop:
            raise ValueError(f"start={self.start} is not allowed; it must be below stop={self.stop}")
        object.__setattr__(self, "extra_skips", all_of(Skip, "extra_skips", self.extra_skips))
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

    def _check_weak_pass(self) -> None:
        if self.weak_pass == "prompt":
            return
        for skip in self.skips if self.weak_pass == "uncond" else ():
            if skip.scale not in (0.0, 1.0):
                raise ValueError(
                    f"scale={skip.scale} is not allowed with weak_pass='uncond': the weak pass is uncond, which the "
                    "guidance scale weighs; 1 is on, 0 is off"
                )
        if self.extra_skips and self.weak_pass == "uncond":
            raise ValueError(
                f"extra_skips={self.extra_skips!r} is not allowed with weak_pass='uncond': there is one uncond pass"
            )
        for entry in self.schedule.entries if self.schedule is not None else ():
            if entry.scale > 0 and entry.guidance_scale is not None and entry.guidance_scale <= 1:
                raise ValueError(
                    f"guidance_scale={entry.guidance_scale} of the entry at sigma={entry.sigma} is not allowed: "
                    f"weak_pass={self.weak_pass!r} acts through CFG; it must be above 1, or the entry's scale 0"
                )

    def _check_audio(self) -> None:
        if self.audio is None:
            return
        if not isinstance(self.audio, AudioGuidance):
            raise ValueError(f"audio={self.audio!r} is not allowed; it must be an AudioGuidance")
        if self.schedule is not None:
            raise ValueError(f"audio={self.audio!r} is not allowed beside a schedule, whose entries have no audio")
        if self.audio.scale is not None and (self.extra_skips or self.weak_pass == "uncond"):
            raise ValueError(f"audio.scale={self.audio.scale} is not allowed: it replaces the scale of one skip branch")
        if self.audio.modality_scale not in (None, 1.0) and self.modality_scale == 1:
            raise ValueError(
                f"audio.modality_scale={self.audio.modality_scale} is not allowed: without modality_scale above 1 "
                "there is no pass with isolated modalities"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> STGConfig:
        """A published setting by name (see `stg_engine.presets`), of a model or, with `layers`, a way of combining.

        `changes` replace fields of it.
        """
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

    @property
    def needs_sigma(self) -> bool:
        """True if a loop must say each step's noise level."""
        is_rescaled = self.schedule is not None or self.rescale > 0 or (self.audio is not None and self.audio.rescale)
        in_x0 = self.space == "x0" and bool(is_rescaled or self.cfg_star)
        return self.schedule is not None or self.zero_init < 1 or in_x0

    def at(self, progress: float | None = None, sigma: float | None = None) -> StepGuidance:
        """The guidance of one step. Raises `ValueError` if the setting needs `progress` or `sigma` and it is None."""
        if sigma is not None:
            sigma = number("sigma", sigma, 0.0, 1.0)
        if progress is not None and not 0 <= (progress := number("progress", progress, 0.0)) < 1:
            raise ValueError(f"progress={progress} is not allowed; it is step index / number of steps, 0 to below 1")
        if sigma is None and (self.schedule is not None or self.zero_init < 1):
            what = "a schedule" if self.schedule is not None else f"zero_init={self.zero_init}"
            raise ValueError(f"sigma=None is not allowed: this setting has {what}; pass the step's sigma")
        if sigma is not None and sigma > self.zero_init:
            return StepGuidance(is_zero=True)
        if self.schedule is not None and sigma is not None:
            return self.of_entry(self.schedule.at(sigma))
        if self.needs_progress:
            if progress is None:
                raise ValueError(
                    f"progress=None is not allowed: start={self.start}, stop={self.stop} need step index / steps"
                )
            if not self.start <= progress < self.stop:
                return self._active((), self.rescale, is_on=False)
        return self._active(self.skips, self.rescale)

    def of_entry(self, entry: ScheduleEntry) -> StepGuidance:
        """The guidance of a schedule's entry."""
        skips = (Skip(entry.layers, entry.scale, self.mode, self.axis),) if entry.scale > 0 else ()
        return self._active(skips, entry.rescale, entry.guidance_scale)

    def _active(
        self, skips: tuple[Skip, ...], rescale: float, guidance_scale: float | None = None, *, is_on: bool = True
    ) -> StepGuidance:
        step = StepGuidance(
            tuple(skip for skip in skips if skip.scale > 0),
            rescale,
            guidance_scale,
            self.modality_scale if is_on else 1.0,
            self.weak_pass,
            self.audio,
        )
        if step.is_guided or self.rescale_cfg:
            return step
        audio = None if self.audio is None else replace(self.audio, rescale=0.0)
        return replace(step, rescale=0.0, audio=audio)
