"""Ways to compute a guided step: what a user could run instead, and the engine, one technique more at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from stg_engine.bench import attention, passes
from stg_engine.bench.attention import Attention
from stg_engine.bench.case import Case, Step, Variant
from stg_engine.bench.passes import AllInputs
from stg_engine.denoiser import Denoiser
from stg_engine.models import spec_of

CFG, BATCHED, UNSHARED, SHARED = "cfg", "batched-passes", "engine-unshared", "engine-shared"
ROW_BY_ROW = ("sequential-passes", "engine-serial")
"""These launch every row on its own."""
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
PIN = "STG_ATTENTION"
FLOAT8_CAPABILITY = (8, 9)

_fastest: dict[tuple[str, str, torch.device], Attention] = {}


@contextmanager
def _cfg(case: Case, transformer: nn.Module, inputs: AllInputs) -> Iterator[Step]:
    with passes.one_batch(case, transformer, inputs, stg=False) as step:
        yield step


@contextmanager
def _best_attention(
    case: Case, transformer: nn.Module, inputs: AllInputs, *, mode: str | None = None
) -> Iterator[Step]:
    """One batch with the fastest exact attention; with a `mode`, every block's forward compiled in it."""
    with passes.one_batch(case, transformer, inputs) as step, ExitStack() as stack:
        sample = next(transformer.parameters())
        key = (case.name, str(sample.dtype), sample.device)
        if key not in _fastest:
            _fastest[key] = attention.fastest(transformer, lambda: step.branches()["cond"], sample.device)
        chosen = _fastest[key]
        context = stack.enter_context(chosen.on(transformer))
        blocks = "modules"
        if mode is not None:
            count = stack.enter_context(_compiled(transformer, mode))
            blocks = f"modules, torch.compile ({mode}) in {count} blocks"

        def within(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with context():
                    return call()

            return run

        yield Step(within(step.guided), within(step.branches), None, lambda: (blocks, str(chosen)))


@contextmanager
def _compiled(transformer: nn.Module, mode: str) -> Iterator[int]:
    """While open, the forwards of blocks are compiled, one function per class. Yields of how many blocks.

    A hook of the block itself, which skips it, stays outside. Dynamo does not look at hooks inside when it reuses code:
    blocks in which attention is skipped run as they are; hooks that cut modalities are in every block alike.
    """
    blocks = [block for block in spec_of(transformer).block_list(transformer) if not _skips_inside(block)]
    functions = {kind: _own_function(kind, mode) for kind in {type(block) for block in blocks}}
    for block in blocks:
        block.forward = MethodType(functions[type(block)], block)
    try:
        yield len(blocks)
    finally:
        for block in blocks:
            del block.forward


def _skips_inside(block: nn.Module) -> bool:
    return any(module._forward_hooks_with_kwargs for module in block.modules() if module is not block)


def _own_function(kind: type[nn.Module], mode: str) -> Any:
    """The class's forward, compiled: with code of its own, as Dynamo keeps what it compiled by code."""
    forward: Any = kind.forward
    code, further = forward.__code__.replace(), (forward.__name__, forward.__defaults__, forward.__closure__)
    own = FunctionType(code, forward.__globals__, *further)
    own.__kwdefaults__ = forward.__kwdefaults__
    return torch.compile(own, mode=None if mode == "default" else mode)


@contextmanager
def _engine(
    case: Case,
    transformer: nn.Module,
    inputs: AllInputs,
    *,
    pinned: str | None = None,
    change: Callable[[nn.Module], None] | None = None,
    **options: Any,
) -> Iterator[Step]:
    """`pinned`: the attention backend of every call; None: the one that `stg_engine.tuning` measures in the first."""
    guidance, g = passes.guidance_of(case), case.guidance_scale
    at: dict[str, Any] = {"progress": case.config.start}
    if change is not None:
        change(transformer)
    with Denoiser(transformer, case.config, **options) as denoiser:
        denoiser.fusion.forget_attention()
        is_first = True

        def guided() -> Any:
            nonlocal is_first
            needs_tuning, is_first = is_first and _is_fused(denoiser), False
            with _pinned(pinned) if pinned else _tuned() if needs_tuning else nullcontext():
                return denoiser(*inputs, guidance_scale=g, **at)

        def branches() -> Any:
            with _pinned(pinned) if pinned else nullcontext():
                return passes.first(denoiser.branches(*inputs, **at))

        def describe() -> tuple[str, str]:
            compiler = getattr(denoiser, "compiler", None)
            blocks = denoiser.fusion.used if compiler is None else compiler.used
            modules = passes.attention_backend(transformer)
            ran = [line.rsplit(": ", 1)[-1] for line in denoiser.fusion.attention()]
            return blocks, "; ".join(dict.fromkeys(ran)) if denoiser.fusion.is_on and ran else modules

        plan = denoiser.plan(guidance, uncond=inputs[2] is not None)
        yield Step(guided, branches, plan, describe)


def _is_fused(denoiser: Denoiser) -> bool:
    return denoiser.kernels == "auto" and denoiser.spec.fused is not None


@contextmanager
def _tuned() -> Iterator[None]:
    from stg_kernels.attention.dispatch import tuning

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tuning.. had nothing to measure")
        with tuning():
            yield


@contextmanager
def _pinned(backend: str) -> Iterator[None]:
    before = os.environ.get(PIN)
    os.environ[PIN] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[PIN]
        else:
            os.environ[PIN] = before


def _to_float8(transformer: nn.Module) -> None:
    """Linear layers of the blocks: float8 weights, float8 activations with a scale per row, found in every call."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    for block in spec_of(transformer).block_list(transformer):
        quantize_(block, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def _anywhere(case: Case, device: torch.device) -> str:
    return ""


def _has_cfg(case: Case, device: torch.device) -> str:
    if case.config.weak_pass == "uncond":
        return "uncond is the case's weak pass"
    return "the case has no CFG" if case.guidance_scale is None else ""


def _needs_cuda(case: Case, device: torch.device) -> str:
    return "" if device.type == "cuda" else "needs CUDA"


def _needs_choice(case: Case, device: torch.device) -> str:
    return "" if device.type == "cuda" else f"needs CUDA: on a CPU there is one exact attention, so it is {BATCHED}"


def _needs_float8(case: Case, device: torch.device) -> str:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        return "needs CUDA with compute capability 8.9"
    return "" if find_spec("torchao") else "needs torchao: pip install torchao"


def _make(
    name: str,
    title: str,
    why_not: Callable[[Case, torch.device], str],
    prepare: Any,
    *,
    is_exact: bool = True,
    **options: Any,
) -> Variant:
    return Variant(name, title, is_exact, why_not, partial(prepare, **options) if options else prepare)


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _make(CFG, "CFG without STG, in one batch", _has_cfg, _cfg),
        _make(BATCHED, "all passes in one batch", _anywhere, passes.one_batch),
        _make("sequential-passes", "passes one by one", _anywhere, passes.one_by_one),
        _make("best-attention", "one batch, fastest exact attention", _needs_choice, _best_attention),
        _make("compiled-passes", "and blocks under torch.compile", _anywhere, _best_attention, mode="default"),
        _make("max-autotune-passes", "and max-autotune", _needs_cuda, _best_attention, mode=MAX_AUTOTUNE),
        _make(UNSHARED, "engine, nothing shared", _anywhere, _engine, share=False, kernels="off"),
        _make(SHARED, "and rows shared", _anywhere, _engine, kernels="off"),
        _make("engine-kernels", "and fused kernels", _anywhere, _engine, pinned="sdpa"),
        _make("engine", "and attention dispatch, after stg_engine.tuning", _anywhere, _engine),
        _make("engine-graph", "and a CUDA graph", _needs_cuda, _engine, graph=True),
        _make("engine-compiled", "rows shared, torch.compile", _anywhere, _engine, kernels="off", compile="default"),
        _make(
            "engine-compiled-graph",
            "and a CUDA graph",
            _needs_cuda,
            _engine,
            kernels="off",
            compile="default",
            graph=True,
        ),
        _make("engine-serial", "the same, row by row", _anywhere, _engine, execution="serial"),
        _make(
            "float8-engine",
            "engine-compiled in float8",
            _needs_float8,
            _engine,
            is_exact=False,
            change=_to_float8,
            kernels="off",
            compile="default",
        ),
    )
}
"""In the order of the ladder."""

SLOW_TO_START = ("compiled-passes", "max-autotune-passes", "engine-compiled", "engine-compiled-graph")
"""They compile for minutes on a CPU, where they run only if they are named."""


def find(names: Sequence[str]) -> list[Variant]:
    """The variants of these names, in the order of the ladder. ValueError names what is unknown and what is allowed."""
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"baselines={name!r} is not known; choose from {', '.join(VARIANTS)}")
    return [variant for name, variant in VARIANTS.items() if name in names]


def default(device: torch.device) -> list[Variant]:
    """All, on a CPU without those that take minutes to start."""
    return [v for v in VARIANTS.values() if device.type == "cuda" or v.name not in SLOW_TO_START]
