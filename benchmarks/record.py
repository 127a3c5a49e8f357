"""One measurement, one CSV row. Rows are appended, never edited; the file is replaced whole, never half-written."""

from __future__ import annotations

import csv
import os
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import stg_engine
from stg_engine.env import processor

RESULTS = Path(__file__).parent / "results"
BASELINES = ("diffusers", "eager")
"""Implementations of an op that others are compared with; the README takes the first one that a run has."""


@dataclass(frozen=True)
class Row:
    """Engine against plain passes, seconds per step: medians of `samples` interleaved runs, with their quartiles.

    error, budget   relative error of the guided prediction against float64: the engine's, the plain passes'
    bound           block-rows of plain passes / block-rows of the plan
    kernels         what the engine's blocks ran: "off" are diffusers' modules
    """

    case: str
    plain: str
    kernels: str
    plain_seconds: float
    plain_iqr: float
    engine_seconds: float
    engine_iqr: float
    samples: int
    bound: float
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

    @property
    def speedup(self) -> float:
        return self.plain_seconds / self.engine_seconds


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

    @property
    def is_cuda(self) -> bool:
        return not self.device.endswith(CORES)


CORES = " cores"
"""Ends the name of a processor, and of no CUDA device."""


def environment(device: torch.device) -> dict[str, str | int]:
    """The fields of a row that say where it was measured."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {os.cpu_count()}{CORES}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers"),
        "stg_engine": stg_engine.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def append(path: Path, *new: Row | OpRow | AttentionRow) -> None:
    """Add rows of one kind to a CSV file."""
    kind = type(new[0])
    rows = [*read(path, kind), *new]
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows)
    temporary.replace(path)


def read(path: Path, kind: Any = Row) -> list[Any]:
    """All rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    kinds = {"float": float, "int": int, "str": str}
    with path.open(newline="") as file:
        return [
            kind(**{field.name: kinds[str(field.type)](row[field.name]) for field in fields(kind)})
            for row in csv.DictReader(file)
        ]


def _commit() -> str:
    """The commit, "-dirty" if a tracked file other than the results differs from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS}")
    return f"{commit}{'-dirty' if changed else ''}" if commit else "unknown"
