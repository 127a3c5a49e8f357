"""Every measurement of a CUDA device, as steps that each fit in minutes: `python -m benchmarks.gpu --out FOLDER`.

A step is one command with a log of its own, FOLDER/STEP.log. What it measures goes to FOLDER/ops.csv, attention.csv and
steps.csv as it comes; a step that ended well leaves FOLDER/STEP.done and is not run again. The call stops at --minutes
and says what is left: the same call goes on from there. `--keep FOLDER` adds the rows to benchmarks/results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.shapes import SHAPES
from stg_engine.bench.case import Case
from stg_engine.bench.cases import CASES

REPEATS = 20
FIRST = ("ltx-video-2b", "mochi")
"""Of the published sizes; the others follow by tokens."""
BASELINES = {
    "sharing": "batched-passes,engine-unshared,engine-shared,engine-kernels,engine",
    "compiled": "batched-passes,compiled-passes,engine,engine-graph,engine-compiled,engine-compiled-graph",
    "max-autotune": "batched-passes,max-autotune-passes,engine,engine-graph,engine-compiled,engine-compiled-graph",
    "others": "batched-passes,cfg,sequential-passes,best-attention,engine-serial,float8-engine",
}
"""Of a published size, whose rows are written when all are measured: ratios need rows of one run."""
KINDS = {"ops.csv": record.OpRow, "attention.csv": record.AttentionRow, "steps.csv": record.StepRow}


def steps(out: Path, repeats: int = REPEATS) -> dict[str, list[str]]:
    """Name -> arguments of Python. Short ones first: tests, ops, attention, small cases, published sizes."""

    def size(case: Case) -> tuple[bool, bool, int]:
        return case.kind == "true", case.name not in FIRST, case.tokens

    shapes = {shape.model.split(",")[0]: shape.model.split(",")[0].lower().replace(" ", "-") for shape in SHAPES}
    cuda = ["--device", "cuda"]
    ops = ["-m", "benchmarks.ops", *cuda, "--compile", "--out", str(out / "ops.csv"), "--models"]
    rows, into = ["--rows", "1", "2", "3"], ["--out", str(out / "attention.csv")]
    attention = ["-m", "benchmarks.attention", *cuda, *rows, *into, "--models"]
    into = ["--csv", str(out / "steps.csv"), "--repeats", str(repeats)]
    bench = ["-m", "stg_engine", "bench", *cuda, *into, "--case"]
    cases = sorted((case for case in CASES.values() if case.kind != "cpu"), key=size)
    return {
        "tests": ["-m", "pytest", "-q", "-m", "gpu"],
        **{f"ops-{name}": [*ops, model] for model, name in shapes.items()},
        **{f"attention-{name}": [*attention, model] for model, name in shapes.items()},
        **{f"case-{case.name}": [*bench, case.name] for case in cases if case.kind == "small"},
        **{
            f"case-{case.name}.{part}": [*bench, case.name, "--baselines", names]
            for case in cases
            if case.kind == "true"
            for part, names in BASELINES.items()
        },
    }


def run(out: Path, commands: Mapping[str, list[str]], chosen: Sequence[str], seconds: float) -> dict[str, str]:
    """Run what is not done yet until the time is over: step -> "done", "failed" or "left"."""
    deadline = time.monotonic() + seconds
    states = dict.fromkeys(chosen, "left")
    for name in chosen:
        done = out / f"{name}.done"
        if not done.exists() and (left := deadline - time.monotonic()) > 0:
            print(f"{name} ... ", end="", flush=True)
            start = time.monotonic()
            status = _status([sys.executable, *commands[name]], out / f"{name}.log", left)
            states[name] = "left" if status is None else "failed" if status else "done"
            print(f"{states[name]}, {time.monotonic() - start:.0f} s", flush=True)
            if status == 0:
                done.touch()
        elif done.exists():
            states[name] = "done"
    return states


def _status(command: list[str], log: Path, seconds: float) -> int | None:
    """The command's exit status; None if it was stopped after so many seconds."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()
            process.wait()


def keep(folder: Path) -> None:
    """Add the folder's rows to benchmarks/results, each once."""
    for name, kind in KINDS.items():
        known = set(record.read(record.RESULTS / name, kind))
        new = [row for row in record.read(folder / name, kind) if row not in known]
        record.append(record.RESULTS / name, new)
        print(f"{name}: {len(new)} new rows")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for rows, logs and marks")
    what.add_argument("--keep", type=Path, metavar="FOLDER", help="add its rows to benchmarks/results")
    parser.add_argument("--minutes", type=float, default=9.5, help="stop after so many minutes (default 9.5)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"samples of a variant (default {REPEATS})")
    parser.add_argument("--list", action="store_true", help="print the steps, run none")
    parser.add_argument("steps", nargs="*", help="only these, or all whose name begins so (default: all)")
    options = parser.parse_args()
    if options.keep is not None:
        if not any((options.keep / name).is_file() for name in KINDS):
            parser.error(f"--keep: {options.keep} holds none of {', '.join(KINDS)}")
        keep(options.keep)
        return 0
    commands = steps(options.out, options.repeats)
    if unknown := [begin for begin in options.steps if not any(name.startswith(begin) for name in commands)]:
        parser.error(f"steps: {unknown[0]!r} begins none of {', '.join(commands)}")
    chosen = [name for name in commands if not options.steps or name.startswith(tuple(options.steps))]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; `make bench` measures on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    states = run(options.out, commands, chosen, 60 * options.minutes)
    for state in ("failed", "left"):
        if found := [name for name in chosen if states[name] == state]:
            print(f"{state}: {' '.join(found)}")
    return int(any(state != "done" for state in states.values()))


if __name__ == "__main__":
    raise SystemExit(main())
