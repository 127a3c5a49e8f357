"""A case's variants measured in turns; a row only for results that are equal to what is exact."""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from stg_engine.bench import ceilings, cost, passes, record, timing
from stg_engine.bench.case import Case, Step, Variant
from stg_engine.bench.gate import Errors, Gate, GateFailure
from stg_engine.bench.passes import AllInputs
from stg_engine.bench.record import StepRow
from stg_engine.bench.variants import CFG, ROW_BY_ROW, SLOW_TO_START
from stg_engine.models import modules_in_blocks, spec_of
from stg_engine.plan import Plan

COMPILATIONS = 64
"""Of one function, which Dynamo otherwise gives up after 8: variants, modes and row counts meet in one process."""
CACHES = {"STG_ATTENTION_CACHE": "attention.json", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""What would make a first call warm. Triton's own is left: its kernels take seconds, not minutes."""
Progress = Callable[[str], None]


@dataclass
class Measured:
    """Of one case: rows in ladder order; per variant without one the reason; `red`: failed gates and crashes."""

    case: Case
    rows: list[StepRow] = field(default_factory=list)
    without: dict[str, str] = field(default_factory=dict)
    red: list[str] = field(default_factory=list)


@torch.no_grad()
def measure(
    case: Case,
    variants: Sequence[Variant],
    device: torch.device,
    dtype: torch.dtype,
    *,
    run: str,
    repeats: int = timing.REPEATS,
    warmup_seconds: float = timing.WARMUP_SECONDS,
    cold_l2: bool = False,
    progress: Progress = lambda what: None,
) -> Measured:
    """All variants that can run on the case, each gated before and after it is timed.

    run       name of the invocation, for the rows; `repeats`, `warmup_seconds`, `cold_l2` see `timing.interleaved`
    progress  called with what is done next: three times, once per variant and once per sample

    A variant that has no memory, or that raises, is left out and said so; the others go on.
    """
    result, chosen = Measured(case), []
    for variant in variants:
        if reason := variant.why_not(case, device):
            result.without[variant.name] = reason
        else:
            chosen.append(variant)
    with _surroundings(chosen), ExitStack() as trials_stack:
        progress(f"{case}: weights")
        transformer, inputs = _build(case, device, dtype)
        progress(f"{case}: exact step")
        gates = _gates(case, transformer, inputs, dtype, any(variant.name == CFG for variant in chosen))
        progress(f"{case}: ceilings")
        model = Model.of(case, transformer, inputs, device, dtype)
        trials = []
        for variant in chosen:
            progress(f"{case}: first call of {variant.name}")
            trial = Trial(variant, case, gates[variant.name == CFG], device)
            trials_stack.callback(trial.close)
            if _survives(trial, partial(trial.open, transformer, inputs), result):
                trials.append(trial)
        timed = {"warmup_seconds": warmup_seconds, "cold_l2": cold_l2}
        samples = _samples(trials, result, device, repeats, lambda name: progress(f"{case}: samples"), **timed)
        machine = {
            "run": run,
            "dtype": str(dtype).removeprefix("torch."),
            "cold_l2": cold_l2,
            **record.environment(device),
        }
        for trial in trials:
            if trial.variant.name in samples and _survives(trial, trial.finish, result):
                result.rows.append(model.row(trial, samples[trial.variant.name], machine))
    return result


def steps_of_progress(variants: int, repeats: int) -> int:
    """How often `measure` calls `progress` for a case."""
    return 3 + variants * (1 + repeats)


class Trial:
    """A variant while it is measured."""

    def __init__(self, variant: Variant, case: Case, gate: Gate, device: torch.device) -> None:
        self.variant, self.case, self.gate, self.device = variant, case, gate, device
        self.cold_seconds, self.passes, self.used = 0.0, 0, ("", "")
        self.peak_bytes: int | None = None
        self.launches: int | None = None
        self.errors = Errors(0.0, 0.0, 0.0)
        self.step: Step
        self._stack = ExitStack()

    def open(self, transformer: nn.Module, inputs: AllInputs) -> None:
        """Prepare it on a twin of the transformer, call it for the first time, and gate the result."""
        before = timing.held_bytes(self.device)
        self.step = self._stack.enter_context(self.variant.prepare(self.case, passes.twin(transformer), inputs))
        start = time.perf_counter()
        self.step.guided()
        timing.synchronize(self.device)
        self.cold_seconds = time.perf_counter() - start
        self.used = self.step.describe()
        self._check()
        self.passes = len(self.step.branches())
        after, peak = timing.held_bytes(self.device), timing.peak_bytes(self.step.guided, self.device)
        if before is not None and after is not None and peak is not None:
            self.peak_bytes = max(0, after - before) + peak

    def finish(self) -> None:
        """After the samples: what a cache or a replayed graph gives must still be right."""
        self._check()
        if (ran := timing.launches(self.step.guided, self.device)) is not None:
            self.launches, attention = ran
            self.used = (self.used[0], attention or self.used[1])

    def close(self) -> None:
        self._stack.close()

    def _check(self) -> None:
        self.errors = self.gate.check(self.step, is_exact=self.variant.is_exact)


def _survives(trial: Trial, call: Callable[[], None], result: Measured) -> bool:
    try:
        call()
    except Exception as error:
        _leave_out(trial, error, result)
        return False
    return True


def _leave_out(trial: Trial, error: BaseException | None, result: Measured) -> None:
    name, reason = trial.variant.name, f"{type(error).__name__}: {error}".split("\n")[0]
    trial.close()
    if isinstance(error, torch.OutOfMemoryError):
        result.without[name] = "out of memory"
        return
    result.without[name] = f"PARITY GATE RED: {error}" if isinstance(error, GateFailure) else reason
    result.red.append(f"{name} of {trial.case}: {result.without[name]}")


def _samples(
    trials: Sequence[Trial],
    result: Measured,
    device: torch.device,
    repeats: int,
    on_progress: Progress,
    **options: Any,
) -> dict[str, list[float]]:
    """Of all in turns. Where one raises, as for want of memory beside the others, these begin anew without it."""
    left = {trial.variant.name: trial for trial in trials}
    while left:
        calls = {name: trial.step.guided for name, trial in left.items()}
        try:
            return timing.interleaved(calls, device, repeats, on_progress=on_progress, **options)
        except timing.Raised as raised:
            _leave_out(left.pop(raised.name), raised.__cause__, result)
    return {}


@dataclass(frozen=True)
class Model:
    """What the rows of a case have in common.

    blocks, unshared   L, and block-rows of the engine with sharing off
    """

    case: Case
    blocks: int
    unshared: int
    costs: cost.BlockCosts
    ceilings: cost.Ceilings

    @classmethod
    def of(
        cls, case: Case, transformer: nn.Module, inputs: AllInputs, device: torch.device, dtype: torch.dtype
    ) -> Model:
        spec, (shared, cond, uncond) = spec_of(transformer), inputs
        blocks = spec.block_list(transformer)
        options = {**spec.plan_options(), "is_shared": False}
        layers = len(blocks) // len(spec.axes)
        plan = Plan.build(passes.guidance_of(case), layers, uncond=uncond is not None, **options)
        attention: Any = modules_in_blocks(blocks, spec.self_attention)[0]
        heads = attention.heads
        size = attention.to_q.out_features // heads
        reached = ceilings.measure(device, dtype, heads, size, case.tokens, case.tokens)
        costs = cost.count(transformer, spec, shared, cond)
        return cls(case, len(blocks), plan.block_rows, costs, reached)

    def row(self, trial: Trial, samples: list[float], machine: dict[str, Any]) -> StepRow:
        case, variant, step, gate = self.case, trial.variant, trial.step, trial.gate
        work = cost.step_cost(
            self.costs,
            step.plan,
            passes=trial.passes if step.plan is None else None,
            max_rows=1 if variant.name in ROW_BY_ROW else None,
        )
        block_rows = self.blocks * trial.passes if step.plan is None else step.plan.block_rows
        low, middle, high = timing.quartiles(samples)
        return StepRow(
            case=case.name,
            kind=case.kind,
            title=case.title,
            tokens=case.tokens,
            variant=variant.name,
            is_exact=variant.is_exact,
            seconds=middle,
            low=low,
            high=high,
            samples=len(samples),
            block_rows=block_rows,
            bound=self.unshared / block_rows,
            error=trial.errors.guided,
            budget=trial.errors.budget if variant.is_exact else None,
            delta_error=trial.errors.delta,
            delta_budget=gate.delta if variant.is_exact else None,
            cold_seconds=trial.cold_seconds,
            peak_bytes=trial.peak_bytes,
            launches=trial.launches,
            kernels=trial.used[0],
            attention=trial.used[1],
            gemm_flops=float(work.gemm_flops),
            attention_flops=float(work.attention_flops),
            moved_bytes=float(work.moved_bytes),
            ideal_seconds=work.seconds(self.ceilings),
            matmul_flops=self.ceilings.matmul,
            attention_ceiling=self.ceilings.attention,
            copy_bytes=self.ceilings.copy,
            **machine,
        )


def _build(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, AllInputs]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = case.build()
    finally:
        torch.set_default_dtype(before)
    return transformer, case.inputs(device, dtype)


def _gates(
    case: Case, transformer: nn.Module, inputs: AllInputs, dtype: torch.dtype, has_cfg: bool
) -> dict[bool, Gate]:
    """The case's gate, and under True that of its CFG alone."""
    spec, given = spec_of(transformer), {**inputs[0], **inputs[1]}
    latents = [given[name] for name in spec.velocity_of or spec.latents[:1]]
    exact, exact_cfg = passes.exact_steps(case, transformer, inputs, dtype)
    with passes.one_by_one(case, transformer, inputs) as plain:
        gates = {False: Gate.of(exact, plain, latents)}
    if has_cfg:
        with passes.one_by_one(case, transformer, inputs, stg=False) as plain:
            gates[True] = Gate.of(exact_cfg, plain, latents)
    return gates


@contextmanager
def _surroundings(variants: Sequence[Variant]) -> Iterator[None]:
    """Attention is measured and blocks are compiled anew, whatever cache folders hold; memory is given back."""
    from stg_kernels.attention.dispatch import choices

    compiles = any(variant.name in SLOW_TO_START or not variant.is_exact for variant in variants)
    with TemporaryDirectory() as folder, warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", "In CPU autocast, but the target dtype is not supported")  # Mochi's RoPE
        stack.callback(choices.forget)
        for name, path in CACHES.items():
            stack.callback(os.environ.update, {name: os.environ[name]} if name in os.environ else {})
            stack.callback(os.environ.pop, name)
            os.environ[name] = f"{folder}/{path}"
        choices.forget()
        if compiles:
            stack.callback(torch.compiler.reset)
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=COMPILATIONS))
        yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
