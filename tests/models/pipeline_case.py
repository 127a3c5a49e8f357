"""What the pipeline tests need of a pipeline, and a run of it in which every pass is a call of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from models.case import Case
from torch import Tensor

from stg_engine import Skip


@dataclass(frozen=True)
class PipelineCase:
    """A tiny pipeline.

    name        its class
    build       () -> the pipeline with random weights, offline
    case        the family's model case: its `skipped` is the oracle of the weak passes
    call        arguments of a short call beside `prompt`; with guidance, without `prompt`
    plain       arguments that switch guidance off; None if it cannot be
    sequential  cond and uncond are calls of their own
    models      attributes of the pipeline that hold its models
    prompts     per number of videos the arguments that say what to make
    """

    name: str
    build: Callable[[], Any]
    case: Case
    call: Mapping[str, Any]
    plain: Mapping[str, Any] | None = field(default_factory=lambda: {"guidance_scale": 1.0})
    sequential: bool = False
    models: Sequence[str] = ("transformer",)
    prompts: Callable[[int], Mapping[str, Any]] = lambda videos: {
        "prompt": ["a red cat", "dogs in the snow"][:videos],
        "negative_prompt": ["blurred", "bad"][:videos],
    }

    def __str__(self) -> str:
        return self.name

    def latents(self, pipe: Any, videos: int = 1, *, guided: bool = True, **arguments: Any) -> Tensor:
        """Final latents of a short call with fixed noise."""
        call = {**self.call, **({} if guided else self.plain or {}), **self.prompts(videos)}
        call["generator"] = [torch.Generator().manual_seed(i) for i in range(videos)]
        call["output_type"] = "latent"
        output = pipe(**{**call, **arguments}, return_dict=False)
        return output[0] if isinstance(output, tuple) else output


def pipeline_cases() -> list[PipelineCase]:
    """The cases of all files in `pipelines/`."""
    names = sorted(path.stem for path in (Path(__file__).parent / "pipelines").glob("*.py"))
    return [case for name in names for case in import_module(f"models.pipelines.{name}").CASES]


@contextmanager
def passes_apart(pipe: Any, case: PipelineCase, skips: Sequence[Skip], *, guided: bool) -> Iterator[None]:
    """The pipeline's own passes, and beside each cond pass a plain call per skip.

    Every row gets D = sum_i s_i (c - p_i): u' + g (c' - u') = u + g (c - u) + D, whatever the pipeline's g is.
    """
    undo = []
    for name in case.models:
        model = getattr(pipe, name, None)
        if model is None:
            continue
        inner, terms = model.forward, []

        def forward(*args, model=model, inner=inner, terms=terms, **kwargs):
            def plain() -> Tensor:
                output = inner(*args, **kwargs)
                return output[0] if isinstance(output, tuple) else output.sample

            rows = plain()
            if terms:  # the second call of the step, uncond
                return (rows + terms.pop(),)
            cond = slice(len(rows) // 2, None) if guided and not case.sequential else slice(None)
            term = torch.zeros_like(rows[cond])
            for skip in skips:
                with case.case.skipped(model, skip):
                    term = term + skip.scale * (rows[cond] - plain()[cond])
            if guided and case.sequential:
                terms.append(term)
            return (rows + torch.cat([term] * (len(rows) // len(term))),)

        own = vars(model).get("forward")
        model.forward = forward
        undo.append((model, own))
    try:
        yield
    finally:
        for model, own in undo:
            del model.forward
            if own is not None:
                model.forward = own
