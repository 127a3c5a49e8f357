"""What a pipeline's way to call its model has to answer; one object per denoising loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from stg_engine.config import StepGuidance, STGConfig
from stg_engine.denoiser import Denoiser
from stg_engine.guidance import skip_term
from stg_engine.plan import Plan, Plans


@dataclass(frozen=True)
class Step:
    """A call in a step of the loop.

    guidance  the step's
    sigma     its noise level, None where the config does not ask for it
    call      0 for the first call in the step, 1 for the second, ...
    denoiser  on the model that was called
    forward   that model's forward below the hook
    """

    guidance: StepGuidance
    sigma: float | None
    call: int
    denoiser: Denoiser
    forward: Any


class Calls:
    """The calls of one denoising loop of `pipe`. A subclass says how they map to branches.

    Where the pipeline's guidance scale g is known, the guided prediction r goes back in every row, and the pipeline's
    own `r + g (r - r)` is the identity. Where it is not, each row gets the skip term: with c' = c + s (c - p) and
    u' = u + s (c - p) the pipeline's `u' + g (c' - u')` is `u + g (c - u) + s (c - p)`.
    """

    models: ClassVar[tuple[str, ...]] = ("transformer",)
    """Attributes of the pipeline that hold its models."""

    most: ClassVar[int] = 1
    """Calls in a step."""

    dtype: ClassVar[torch.dtype | None] = torch.float32
    """What goes back to the pipeline: float32 where it takes that, None: the dtype of the model's output."""

    own: ClassVar[STGConfig | None] = None
    """Stands for config=None: the pipeline has STG of its own. None: config=None is the preset of the model."""

    sees_plain_steps: ClassVar[bool] = False
    """Whether `predict` gets the calls of steps in which nothing of the setting acts."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def guidance(self, planned: StepGuidance, config: STGConfig) -> StepGuidance:
        """What the engine runs in the step that begins, for which `config` says `planned`."""
        return planned

    def plans(self, denoiser: Denoiser) -> Plan | Plans:
        """Rows per block of this loop's steps."""
        return denoiser.plans(uncond=bool(self.has_uncond()))

    def has_uncond(self) -> bool | None:
        """Whether this step evaluates the negative prompt; None: not known yet."""
        return bool(self.pipe.do_classifier_free_guidance)

    def guidance_scale(self, model: Any) -> float | Tensor | None:
        """g of the pipeline's own guidance in this step; None: not known when the model is called."""
        return self.pipe.guidance_scale

    def predict(self, step: Step, arguments: dict[str, Any]) -> Any:
        """The model's call with these keyword arguments -> what it returns to the pipeline."""
        raise NotImplementedError

    def end(self) -> None:
        """The loop has ended, without an exception."""

    def rescale(self) -> float:
        """The call's own guidance_rescale, which diffusers ignores without an uncond branch."""
        return float(getattr(self.pipe, "guidance_rescale", 0.0)) if self.has_uncond() else 0.0

    def check(self, guidance: StepGuidance) -> None:
        """`ValueError` for guidance that this call of the pipeline cannot have."""
        if self.rescale() > 0 and guidance.rescale > 0:
            raise ValueError(
                f"guidance_rescale={self.rescale()} and rescale={guidance.rescale} are the same operation; "
                "set one of them"
            )
        if guidance.needs_uncond and self.has_uncond() is False:
            raise ValueError(
                f"weak_pass={guidance.weak_pass!r} acts through CFG, which is off in this call of the pipeline; switch "
                "it on, or use weak_pass='prompt'"
            )
        if (guidance.guidance_scale or 0) > 1 and not self.has_uncond():
            raise ValueError(
                f"guidance_scale={guidance.guidance_scale} in the schedule needs the negative prompt; "
                "call the pipeline with guidance_scale above 1 so that it encodes one"
            )

    def reads_uncond(self, guidance: StepGuidance) -> bool:
        """Whether the step needs the uncond branch, if the pipeline has one."""
        return guidance.guidance_scale is None or guidance.guidance_scale > 1

    def results(self, step: Step, names: tuple[str, ...], rows: Tensor, **options: Any) -> dict[str, Tensor]:
        """What the pipeline gets for its cond row and, if it has one, its uncond row, of the branches' `rows`.

        `options` are those of `Denoiser.combine`.
        """
        denoiser, guidance = step.denoiser, step.guidance
        scale: float | Tensor | None = guidance.guidance_scale
        if scale is None:
            scale = self.guidance_scale(denoiser.transformer) if self.has_uncond() else 1.0
        if scale is None:
            self._check_scale_is_not_needed(step)
            return self.with_skip_term(guidance, names, rows)
        return self.in_every_row(
            denoiser.combine(guidance, names, rows, scale, self.rescale(), self._dtype(rows), **options)
        )

    def in_every_row(self, guided: Tensor) -> dict[str, Tensor]:
        """The guided prediction for each row that the pipeline asked for."""
        return dict.fromkeys(("cond", "uncond") if self.has_uncond() else ("cond",), guided)

    def with_skip_term(self, step: StepGuidance, names: tuple[str, ...], rows: Tensor) -> dict[str, Tensor]:
        """{"cond": c + D, "uncond": u + D} with D = sum_i s_i (c - p_i); uncond only if `rows` have it.

        With p_i on the negative prompt each has a D of its own, c's or u's: q + D_q follows by CFG, which is linear.
        """
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        branches = dict(zip(names, wide.chunk(len(names)), strict=True))
        skips = [(branches[name], skip.scale) for name, skip in zip(step.names, step.skips, strict=False)]
        results = {name: branches[name] for name in ("cond", "uncond") if name in branches}
        bases = results if step.weak_pass == "negative_prompt" else dict.fromkeys(results, branches["cond"])
        return {name: (row + skip_term(bases[name], skips)).to(self._dtype(rows)) for name, row in results.items()}

    def _dtype(self, rows: Tensor) -> torch.dtype:
        return rows.dtype if self.dtype is None else torch.promote_types(rows.dtype, self.dtype)

    def _check_scale_is_not_needed(self, step: Step) -> None:
        config = step.denoiser.config
        for field, is_used in (
            ("rescale", step.guidance.rescale > 0),
            ("cfg_star", config.cfg_star),
            ("arithmetic", config.arithmetic != "float32"),
        ):
            if is_used:
                raise ValueError(
                    f"{field}={getattr(config, field)!r} needs the guidance scale, which {type(self.pipe).__name__} "
                    "does not tell before it is applied; leave it out, or use a Denoiser in a loop of your own"
                )


def output_like(result: Tensor, *, return_dict: bool) -> Any:
    """A model's output as the pipeline asked for it."""
    return Transformer2DModelOutput(sample=result) if return_dict else (result,)
