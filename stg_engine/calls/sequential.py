"""Pipelines that call their model once per branch: cond first, then uncond if there is one.

Both calls of a step are answered by one forward: the first returns a tensor that the second fills. That is right where
the pipeline computes nothing with the first result before it has the second, as in all pipelines listed for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stg_engine.calls.base import Calls, Step, output_like


class Sequential(Calls):
    """SkyReels-V2, ..."""

    most = 2

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._first: dict[str, Any] = {}
        self._unfilled: Tensor | None = None

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
            self._unfilled = self._nothing_yet(step, arguments)
            return self._unfilled
        shared, cond = _split(step, arguments)
        names, (rows, *_) = step.denoiser.predict(step.guidance, shared, cond, None, step.forward)
        return self.results(step, names, rows)["cond"]

    def answer_uncond(self, step: Step, arguments: dict[str, Any]) -> Tensor:
        """The second call: all branches in one forward."""
        (shared, uncond), (same, cond) = _split(step, arguments), _split(step, self._first)
        differing = [name for name in shared if shared[name] is not same.get(name)]
        if self._unfilled is None or differing:
            raise RuntimeError(
                f"{type(self.pipe).__name__} called its model twice in a step, and not for cond and uncond of the same "
                f"latents: {', '.join(differing) or 'guidance is off'}"
            )
        names, (rows, *_) = step.denoiser.predict(
            step.guidance, shared, cond, uncond if self.reads_uncond(step.guidance) else None, step.forward
        )
        results = self.results(step, names, rows)
        self._unfilled.copy_(results["cond"])
        self._unfilled = None
        return results["uncond"]

    def _nothing_yet(self, step: Step, arguments: dict[str, Any]) -> Tensor:
        latents = arguments[step.denoiser.spec.latents[0]]
        channels = step.denoiser.transformer.config.out_channels or latents.shape[1]
        size = (latents.shape[0], channels, *latents.shape[2:])
        return latents.new_full(size, torch.nan, dtype=self._dtype(latents))


class TwoModels(Sequential):
    """Wan: up to two transformers, each with a guidance scale, which the call reads once."""

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
        self._skip_term: Tensor | None = None

    def has_uncond(self) -> bool | None:
        return None if self._calls is None else self._calls == 2

    def guidance_scale(self, model: Any) -> None:
        return None

    def answer_cond(self, step: Step, arguments: dict[str, Any]) -> Tensor:
        if self._calls is None and self._skip_term is not None:
            self._calls, self._skip_term = 1, None  # a whole step without a second call
        if self._calls is not None:
            return super().answer_cond(step, arguments)
        shared, cond = _split(step, arguments)
        names, (rows, *_) = step.denoiser.predict(step.guidance, shared, cond, None, step.forward)
        cond_with_term = self.with_skip_term(step.guidance, names, rows)["cond"]
        self._skip_term = cond_with_term - rows.chunk(len(names))[names.index("cond")]
        return self.results(step, names, rows)["cond"]

    def answer_uncond(self, step: Step, arguments: dict[str, Any]) -> Tensor:
        if self._calls is not None:
            return super().answer_uncond(step, arguments)
        assert self._skip_term is not None
        self._check_scale_is_not_needed(step)
        (uncond,) = step.forward(**arguments, return_dict=False)
        result = uncond + self._skip_term
        self._calls, self._skip_term = 2, None
        return result


def _split(step: Step, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what all branches have in common, the prompt's) of a call's arguments."""
    prompt = {name: value for name, value in arguments.items() if name in step.denoiser.spec.prompt}
    return {name: value for name, value in arguments.items() if name not in prompt}, prompt
