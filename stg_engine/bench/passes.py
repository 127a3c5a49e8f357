"""Guided steps as plain passes of a whole transformer: the baselines of every benchmark, and what is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.bench.case import Case, Inputs, Step
from stg_engine.config import StepGuidance
from stg_engine.models import spec_of
from stg_engine.oracle import combined
from stg_engine.reference import one_batch_of_passes, passes_apart, passes_one_by_one

AllInputs = tuple[Inputs, Inputs, Inputs | None]
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def guidance_of(case: Case, *, stg: bool = True) -> StepGuidance:
    """What a step of the case does; without `stg` its CFG alone. `ValueError` for a config that asks for a sigma."""
    if case.config.needs_sigma:
        raise ValueError(f"{case}: its config asks for a sigma, which a step on its own does not have")
    step = case.config.at(case.config.start, None)
    if stg:
        return step
    audio = None if step.audio is None else replace(step.audio, scale=None, modality_scale=None, rescale=None)
    return replace(step, skips=(), rescale=0.0, modality_scale=1.0, audio=audio)


@contextmanager
def one_batch(case: Case, transformer: nn.Module, inputs: AllInputs, *, stg: bool = True) -> Iterator[Step]:
    """All passes as one call, as the published pipelines run them: skipped blocks are computed and thrown away."""
    guidance, (_, cond, uncond) = guidance_of(case, stg=stg), inputs
    options = {"modality": guidance.modality_scale != 1}
    with one_batch_of_passes(transformer, guidance.skips, cond, uncond, case.config.weak_pass, **options) as passes:
        yield _step(case, transformer, inputs, guidance, passes)


@contextmanager
def one_by_one(case: Case, transformer: nn.Module, inputs: AllInputs, *, stg: bool = True) -> Iterator[Step]:
    """A call for each pass."""
    guidance, (_, cond, uncond) = guidance_of(case, stg=stg), inputs
    twins = [twin(transformer) for _ in guidance.skips]
    options = {"modality": guidance.modality_scale != 1}
    with passes_apart(transformer, twins, guidance.skips, cond, uncond, case.config.weak_pass, **options) as passes:
        yield _step(case, transformer, inputs, guidance, passes)


def _step(
    case: Case, transformer: nn.Module, inputs: AllInputs, guidance: StepGuidance, passes: Callable[[Inputs], Any]
) -> Step:
    shared, cond, _ = inputs

    def guided() -> Any:
        return _guided(case, transformer, guidance, passes(shared), {**shared, **cond})

    return Step(guided, lambda: first(passes(shared)), None, lambda: ("modules", attention_backend(transformer)))


def _guided(case: Case, transformer: nn.Module, guidance: StepGuidance, branches: Any, inputs: Inputs) -> Any:
    g = 1.0 if case.guidance_scale is None else case.guidance_scale
    levels = [None] * (len(branches) if isinstance(branches, tuple) else 1)
    return combined(transformer, case.config, guidance, branches, inputs, g, levels)


def first(outputs: Any) -> Any:
    """Of the first output."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def attention_backend(transformer: nn.Module) -> str:
    """diffusers' attention backend of the first block that has one."""
    from stg_engine import report
    from stg_engine.models import modules_in_blocks

    spec = spec_of(transformer)
    return report.attention_backend(modules_in_blocks(spec.block_list(transformer), spec.self_attention)[0])


def twin(transformer: nn.Module) -> Any:
    """A module of its own on the same parameters and buffers, which hooks, processors and quantisation may change."""
    tensors = chain(transformer.parameters(), transformer.buffers())
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})


@dataclass(frozen=True)
class Exact:
    """A step in twice the precision: `guided` of every output; `branches` of the first."""

    guided: tuple[Tensor, ...]
    branches: dict[str, Tensor]


def exact_steps(case: Case, transformer: nn.Module, inputs: AllInputs, dtype: torch.dtype) -> tuple[Exact, Exact]:
    """The step of plain passes one by one in float32 of bfloat16 and float16, in float64 of float32; and its CFG alone.

    The transformer itself is widened in place, as a copy might not fit beside it, and narrowed again, which gives back
    the same bits.
    """
    guidance, plain = guidance_of(case), guidance_of(case, stg=False)
    shared, cond = (widened(group, WIDER[dtype]) for group in inputs[:2])
    uncond = None if inputs[2] is None else widened(inputs[2], WIDER[dtype])
    with wide_weights(transformer, WIDER[dtype]), _no_tf32():
        options = {"modality": guidance.modality_scale != 1}
        branches = passes_one_by_one(
            transformer, guidance.skips, shared, cond, uncond, case.config.weak_pass, **options
        )

        def exact(step: StepGuidance, outputs: tuple[dict[str, Tensor], ...]) -> Exact:
            guided = _guided(case, transformer, step, outputs, {**shared, **cond})
            return Exact(guided if isinstance(guided, tuple) else (guided,), outputs[0])

        outputs = branches if isinstance(branches, tuple) else (branches,)
        of_cfg = [{name: b for name, b in output.items() if name in ("cond", "uncond")} for output in outputs]
        return exact(guidance, outputs), exact(plain, tuple(of_cfg))


def widened(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """Floating-point tensors in `dtype` if that is wider."""
    return {
        name: value.to(_wider(value, dtype)) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }


@contextmanager
def wide_weights(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While open, floating-point parameters and buffers are in `dtype` if that is wider; then bit for bit as before."""
    narrow = {tensor: tensor.dtype for tensor in chain(module.parameters(), module.buffers())}
    try:
        for tensor in narrow:
            tensor.data = tensor.data.to(_wider(tensor, dtype))
        yield
    finally:
        for tensor, before in narrow.items():
            tensor.data = tensor.data.to(before)


def _wider(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(tensor.dtype, dtype) if tensor.is_floating_point() else tensor.dtype


@contextmanager
def _no_tf32() -> Iterator[None]:
    """float32 with all of its bits, in convolutions too."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
