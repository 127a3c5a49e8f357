"""One measurement of one variant of one case: a row of a CSV file, an object of a JSON file."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

import stg_engine
from stg_engine import env

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
"""In a checkout."""
CORES = " cores"
"""Ends the name of a processor, and of no CUDA device."""

R = TypeVar("R")


@dataclass(frozen=True)
class StepRow:
    """One guided step. Empty cells (None) were not measured; no row is written on a red parity gate.

    run        one invocation: all rows of a `run` were measured in turns in one process
    case, kind, title, tokens   see `Case`; `variant`, `is_exact` see `Variant`
    seconds    median of `samples`, `low` and `high` the quartiles; `cold_l2`: the cache was overwritten before each
    block_rows computed per video; `bound` = block-rows of the engine with sharing off / these
    error      |guided - exact| / |exact|, L2; `exact`: the same weights in twice the precision (float32 of bfloat16,
               float64 of float32); `delta_error` that of c - p. Budgets: twice those of three plain passes in this
               dtype; None for a lossy variant
    cold_seconds    the first call in the process: compilation, capture, tuning
    peak_bytes      beyond weights and inputs: what the variant holds between steps, a graph's pool included, and what
                    a step allocates (CUDA)
    launches        kernels of one step (CUDA)
    kernels, attention    what the blocks and their attention ran
    gemm_flops, attention_flops, moved_bytes   of a step by the cost model (see `cost`)
    ideal_seconds   these at the ceilings below, which were measured in the same run
    matmul_flops, attention_ceiling, copy_bytes   FLOP/s, FLOP/s, bytes/s
    """

    run: str
    case: str
    kind: str
    title: str
    tokens: int
    variant: str
    is_exact: bool
    seconds: float
    low: float
    high: float
    samples: int
    cold_l2: bool
    block_rows: int
    bound: float
    error: float
    budget: float | None
    delta_error: float
    delta_budget: float | None
    cold_seconds: float
    peak_bytes: int | None
    launches: int | None
    kernels: str
    attention: str
    gemm_flops: float
    attention_flops: float
    moved_bytes: float
    ideal_seconds: float
    matmul_flops: float
    attention_ceiling: float
    copy_bytes: float
    dtype: str
    device: str
    threads: int
    clock_mhz: int | None
    driver: str
    cuda: str
    cudnn: str
    sdpa: str
    torch: str
    triton: str
    diffusers: str
    stg_engine: str
    commit: str
    date: str


def append(path: Path, rows: Sequence[Any]) -> None:
    """Add rows, dataclasses of one kind, to a CSV file; None is an empty cell. The file is replaced whole.

    Processes that add to files of one folder wait for each other, so that none loses another's rows.
    """
    if not rows:
        return
    kind = type(rows[0])
    with _alone_in(path.absolute().parent):
        lines = [asdict(row) for row in (*read(path, kind), *rows)]
        with _whole(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)


def read(path: Path, kind: type[R]) -> list[R]:
    """All rows of a CSV file; none if there is no file. `ValueError` that names the file if it holds another kind."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        _check_names(path, kind, lines.fieldnames or ())
        types = _types(kind)
        return [kind(**{name: _value(cell, types[name]) for name, cell in line.items()}) for line in lines]


def to_json(path: Path, rows: Iterable[Any]) -> None:
    """Write rows, dataclasses of one kind, as a JSON list of objects. The file is replaced whole."""
    with _whole(path) as temporary:
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def from_json(path: Path, kind: type[R]) -> list[R]:
    """What `to_json` wrote. `ValueError` that names the file if it holds something else."""
    try:
        lines = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as what --json writes: {error}") from None
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"{path} is not allowed; it must hold a list of objects, as --json writes")
    for line in lines:
        _check_names(path, kind, line)
    return [kind(**line) for line in lines]


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of a row that say where and when it was measured; `clock_mhz` is that of this moment."""
    found = env.versions()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "clock_mhz": env.clock_mhz(device),
        "driver": env.driver() if device.type == "cuda" else "",
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or "") if device.type == "cuda" else "",
        "sdpa": env.attention_priority(),
        "torch": torch.__version__,
        "triton": found["triton"],
        "diffusers": found["diffusers"],
        "stg_engine": stg_engine.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """The checkout's commit, "-dirty" if a tracked file other than the results differs from it; "unknown" elsewhere."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    if not git("ls-files", "--", Path(__file__).name):  # installed, perhaps inside a repository of something else
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS}")
    return f"{git('rev-parse', '--short', 'HEAD')}{'-dirty' if changed else ''}"


def _processor() -> str:
    return f"{env.processor()}, {os.cpu_count()}{CORES}"


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of `path`; gone if that raises."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(cell: str, annotation: str) -> Any:
    kind, _, optional = annotation.partition(" | ")
    if optional and not cell:
        return None
    return cell == "True" if kind == "bool" else {"float": float, "int": int, "str": str}[kind](cell)


def _types(kind: type[Any]) -> dict[str, str]:
    return {field.name: str(field.type) for field in fields(kind)}


def _check_names(path: Path, kind: type[Any], names: Iterable[str]) -> None:
    expected = set(_types(kind))
    if expected != set(names):
        lacking = [name for name in _types(kind) if name not in names]
        missing, further = _some(lacking), _some(sorted(set(names) - expected))
        raise ValueError(
            f"{path} holds no {kind.__name__}s of this version: missing fields: {missing}; unknown fields: {further}"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:3]) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
