"""Pipelines that call their model once per branch: cond first, then uncond if there is one.

Both calls of a step are answered by one forward: the first returns a tensor that the second fills. That is right where
the pipeline computes nothing with the first result before it has the second, as in all pipelines listed for it. The
tensor is held weakly: if it is gone when the second call comes, the pipeline has a copy of it, which cannot be filled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from stg_engine.calls.base import Calls, Step, output_like
from stg_engine.config import StepGuidance


class Sequential(Calls):
    """One model whose guidance scale the pipeline reads anew in each step."""

    most = 2

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._first: dict[str, Any] = {}
        self._unfilled: TensorWeakRef | None = None

    def predict(self, step: Step, arguments: dict[str, Any]) -> Any:
        return_dict = arguments.pop("return_dict", True)
        answer = (self.answer_cond, self.answer_uncond)[step.call](step, arguments)
        return output_like(answer, return_dict=return_dict)

    def end(self) -> None:
        if self._unfilled is not None:
            raise RuntimeError(
                f"{type(self.pipe).__name__} went on without its second call of the model in a step; "
                "the prediction of that step was never computed"
            )

    def answer_cond(self, step: Step, arguments: dict[str, Any]) -> Tensor:
        """The first call: a tensor of NaN that the second call fills; without one, the guided prediction."""
        self.end()
        self._first = arguments
        if self.has_uncond():
            answer = self._nothing_yet(step, arguments)
            self._unfilled = TensorWeakRef(answer)
            return answer
        shared, cond = _split(step, arguments)
        return self.results(step, *_predict(step, shared, cond))["cond"]

    def answer_uncond(self, step: Step, arguments: dict[str, Any]) -> Tensor:
        """The second call: all branches in one forward."""
        (shared, uncond), (same, cond) = _split(step, arguments), _split(step, self._first)
        differing = [name for name, value in shared.items() if not _is_same(value, same.get(name))]
        if self._unfilled is None or differing:
            raise RuntimeError(
                f"{type(self.pipe).__name__} called its model twice in a step, and not for cond and uncond of the same "
                f"latents: {', '.join(differing) or 'guidance is off'}"
            )
        read = uncond if self.reads_uncond(step.guidance) else None
        answer = self._unfilled()
        if answer is None:
            raise RuntimeError(
                f"what the first call of the model in a step of the {type(self.pipe).__name__} returned was copied "
                "before the second call, which fills it (by a forward hook on the transformer, or by moving it to "
                "another device); take the hook off, or use a Denoiser in a loop of your own"
            )
        results = self.results(step, *_predict(step, shared, cond, read))
        answer.copy_(results["cond"])
        self._unfilled = None
        return results["uncond"]

    def _nothing_yet(self, step: Step, arguments: dict[str, Any]) -> Tensor:
        latents = arguments[step.denoiser.spec.latents[0]]
        channels = step.denoiser.transformer.config.out_channels or latents.shape[1]
        size = (latents.shape[0], channels, *latents.shape[2:])
        return latents.new_full(size, torch.nan, dtype=self._dtype(latents))


class TwoModels(Sequential):
    """Wan, SkyReels-V2: up to two transformers, each with a guidance scale, which the call reads once."""

    models = ("transformer", "transformer_2")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._scales = {"transformer": pipe._guidance_scale, "transformer_2": getattr(pipe, "_guidance_scale_2", None)}

    def guidance_scale(self, model: Any) -> float | None:
        return next(scale for name, scale in self._scales.items() if getattr(self.pipe, name, None) is model)


class TrueCFG(Sequential):
    """HunyuanVideo: CFG beside the distilled guidance is a local of the call, scale and all.

    The loop's first guided step shows whether there is a second call: it gets a forward of its own then.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._calls: int | None = None
        self._first_answer: tuple[Tensor, Tensor] | None = None

    def has_uncond(self) -> bool | None:
        return None if self._calls is None else self._calls == 2

    def guidance_scale(self, model: Any) -> None:
        return None

    def check(self, guidance: StepGuidance) -> None:
        if guidance.needs_uncond:
            raise ValueError(
                f"weak_pass={guidance.weak_pass!r} is not allowed with {type(self.pipe).__name__}, which does not tell "
                "whether CFG is on before the skips have run; use weak_pass='prompt'"
            )
        super().check(guidance)

    def answer_cond(self, step: Step, arguments: dict[str, Any]) -> Tensor:
        if self._calls is None and self._first_answer is not None:
            self._calls, self._first_answer = 1, None  # a whole step without a second call
        if self._calls is not None:
            return super().answer_cond(step, arguments)
        shared, cond = _split(step, arguments)
        names, rows = _predict(step, shared, cond)
        skip_term = (
            self.with_skip_term(step.guidance, names, rows)["cond"] - rows.chunk(len(names))[names.index("cond")]
        )
        self._first_answer = self.results(step, names, rows)["cond"], skip_term
        return self._first_answer[0]

    def answer_uncond(self, step: Step, arguments: dict[str, Any]) -> Tensor:
        if self._first_answer is None:
            return super().answer_uncond(step, arguments)
        (answer, skip_term), self._first_answer, self._calls = self._first_answer, None, 2
        if step.guidance.guidance_scale is not None:  # the schedule's: no CFG in this step
            return answer
        self._check_scale_is_not_needed(step)
        (uncond,) = step.forward(**arguments, return_dict=False)
        return uncond + skip_term


def _predict(
    step: Step, shared: dict[str, Any], cond: dict[str, Any], uncond: dict[str, Any] | None = None
) -> tuple[tuple[str, ...], Tensor]:
    """The branches' names and rows. A negative prompt of another length than the prompt has a forward of its own."""
    apart = uncond if uncond is not None and _shapes(uncond) != _shapes(cond) else None
    together = uncond if apart is None else None
    names, (rows, *_) = step.denoiser.predict(step.guidance, shared, cond, together, step.forward)
    if apart is not None:
        (other,) = step.denoiser.plain(step.forward, {**shared, **apart, "return_dict": False})
        names, rows = ("uncond", *names), torch.cat([other, rows])
    return names, rows


def _is_same(value: Any, other: Any) -> bool:
    """Offloading passes on the tensors that are in their place already, and copies of dicts."""
    return value is other or (not isinstance(value, Tensor) and bool(value == other))


def _shapes(prompt: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in prompt.items()}


def _split(step: Step, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what all branches have in common, the prompt's) of a call's arguments."""
    prompt = {name: value for name, value in arguments.items() if name in step.denoiser.spec.prompt}
    return {name: value for name, value in arguments.items() if name not in prompt}, prompt
