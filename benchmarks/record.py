"""One measurement, one CSV row. Rows are appended, never edited; the file is replaced whole, never half-written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stg_engine.bench import record
from stg_engine.bench.record import CORES, RESULTS, StepRow, append, read

__all__ = [
    "BASELINES",
    "RESULTS",
    "STEPS",
    "AttentionRow",
    "OpRow",
    "StepRow",
    "append",
    "environment",
    "is_cuda",
    "read",
]

STEPS = RESULTS / "steps.csv"
"""Rows of `stg-engine bench`."""
BASELINES = ("diffusers", "eager")
"""Implementations of an op that others are compared with; the README takes the first one that a run has."""


@dataclass(frozen=True)
class OpRow:
    """One op at one model's shape: median seconds of one call, and its quartile range.

    implementation  "fused" (Triton), "native" (C++/CUDA), "diffusers" (what its modules run), "eager" (the reference:
                    plain torch, float32 inside) or "compile" (torch.compile of the reference)
    gb_per_second   bytes that must be read and written once / seconds
    copy_gb_per_second   what a copy of as many bytes reached in the same run
    error, budget   largest error against float64: the implementation's, eager's
    """

    op: str
    implementation: str
    model: str
    rows: int
    seconds: float
    iqr: float
    gb_per_second: float
    copy_gb_per_second: float
    error: float
    budget: float
    dtype: str
    device: str
    threads: int
    torch: str
    diffusers: str
    stg_engine: str
    commit: str
    date: str


@dataclass(frozen=True)
class AttentionRow:
    """Attention of one model's shape: median seconds of one call, and its quartile range.

    case            see `benchmarks.attention`; "..., dense part" and "..., own keys part" are those rows and queries of
                    a call that one kernel computes
    backend         what ran; "dispatch: ..." is the call without a pinned backend, "... (lossy)" is not exact
    rows, queries, keys   [rows, queries] tokens over `keys` tokens, padding included
    tflops          4 D FLOPs per head and pair of a query and a key that exists / seconds
    matmul_tflops   what a large matrix product of the same dtype reached in the same run
    error, budget   largest error against float64 in sampled queries, and what is allowed: twice that of plain torch in
                    this dtype
    """

    case: str
    backend: str
    model: str
    rows: int
    queries: int
    keys: int
    heads: int
    head_size: int
    seconds: float
    iqr: float
    tflops: float
    matmul_tflops: float
    error: float
    budget: float
    dtype: str
    device: str
    threads: int
    torch: str
    diffusers: str
    stg_engine: str
    commit: str
    date: str


def is_cuda(row: AttentionRow | StepRow) -> bool:
    """Measured on a CUDA device."""
    return not row.device.endswith(CORES)


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of a row that say where it was measured."""
    names = ("device", "threads", "torch", "diffusers", "stg_engine", "commit", "date")
    return {name: value for name, value in record.environment(device).items() if name in names}
