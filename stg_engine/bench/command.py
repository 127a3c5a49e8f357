"""`stg-engine bench`: its options, what it prints and what it writes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `stg-engine --help` loads no torch
    import torch

    from stg_engine.bench.case import Case, Variant
    from stg_engine.bench.record import StepRow
    from stg_engine.bench.run import Measured

PLOTS = (".pdf", ".png", ".svg")


@dataclass(frozen=True)
class BenchRequest:
    """The options of `stg-engine bench`; None is the default that depends on the device."""

    case: tuple[str, ...] | None = None
    baselines: tuple[str, ...] | None = None
    json: str | None = None
    csv: str | None = None
    plot: str | None = None
    compare: str | None = None
    repeats: int | None = None
    cold_l2: bool = False
    device: str | None = None
    dtype: str | None = None
    list: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured (names: --list)")
    group.add_argument(
        "--case",
        type=_names,
        metavar="NAME,...",
        help="cases, or all of a kind: true, small, cpu (default: cpu on a CPU, else true)",
    )
    group.add_argument(
        "--baselines",
        type=_names,
        metavar="NAME,...",
        help="variants (default: all that the device can run; on a CPU without those that compile for minutes)",
    )
    group.add_argument("--list", action="store_true", help="print cases and variants, measure nothing")
    group.add_argument("--repeats", type=int, metavar="N", help="samples of each variant (default: 20)")
    group.add_argument("--cold-l2", action="store_true", help="overwrite the cache before each sample")
    group.add_argument("--device", metavar="D", help="such as cuda, cuda:1, cpu (default: cuda where there is one)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32 on cpu, else bfloat16)"
    )
    group = parser.add_argument_group(
        "files (rows are written case by case, each file as a whole; the plot at the end)"
    )
    group.add_argument("--json", metavar="FILE", help="the rows of this run; a file that is there is replaced")
    group.add_argument("--csv", metavar="FILE", help="the rows, behind those that are there")
    group.add_argument("--plot", metavar="FILE", help=f"a waterfall of this run: {', '.join(PLOTS)}; needs matplotlib")
    group.add_argument("--compare", metavar="FILE", help="print ratios to the rows that --json or --csv wrote")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def bench(request: BenchRequest) -> None:
    """Measure, print a table per case, write the files.

    ValueError for a wrong option before anything runs; `GateFailure` at the end if a result was not equal to what is
    exact, or a variant raised; KeyboardInterrupt says what was written.
    """
    import torch

    from stg_engine.bench import cases, table, timing, variants
    from stg_engine.bench.gate import GateFailure
    from stg_engine.generate import choose_device, choose_dtype

    if request.list:
        print("\n".join(["cases:", *_case_lines(list(cases.CASES.values())), "", "variants:", table.variants_table()]))
        return
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    chosen = cases.find(request.case or ("true" if device.type == "cuda" else "cpu",))
    ways = variants.default(device) if request.baselines is None else variants.find(request.baselines)
    repeats = timing.REPEATS if request.repeats is None else request.repeats
    if repeats < 1:
        raise ValueError(f"repeats={repeats} is not allowed; it must be at least 1")
    files = _Files(request)
    if request.baselines is None and device.type != "cuda":
        print(f"without {', '.join(variants.SLOW_TO_START)}: they compile for minutes on a CPU; name them if needed\n")
    print(f"{table.LEGEND}\n", flush=True)
    red: list[str] = []
    try:
        for case in chosen:
            try:
                measured = _measure(case, ways, device, dtype, files.run, repeats, request.cold_l2)
            except Exception as error:  # the other cases go on
                is_memory = isinstance(error, torch.OutOfMemoryError)
                reason = "no memory for its weights and exact step" if is_memory else f"{type(error).__name__}: {error}"
                red.append(f"{case}: {reason}")
                print(f"{red[-1]}\n", flush=True)
                continue
            print(f"{table.case_table(measured.rows, measured.without) or case}\n", flush=True)
            files.add(measured.rows)
            red += measured.red
        files.draw()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(files.written) from None
    if files.old is not None:
        print(f"against {request.compare}:\n{table.comparison(files.rows, files.old)}\n")
    print(files.written)
    if red:
        raise GateFailure("; ".join(red))


def _case_lines(cases: Sequence[Case]) -> list[str]:
    width = max(len(case.name) for case in cases)
    return [f"{case.name:<{width}}  {case.kind:<5}  {case.title}, {case.tokens} tokens" for case in cases]


def _measure(
    case: Case,
    ways: Sequence[Variant],
    device: torch.device,
    dtype: torch.dtype,
    run: str,
    repeats: int,
    cold_l2: bool,
) -> Measured:
    from tqdm import tqdm

    from stg_engine.bench import timing
    from stg_engine.bench.run import measure, steps_of_progress

    total = steps_of_progress(sum(not way.why_not(case, device) for way in ways), repeats)
    with tqdm(total=total, leave=False, disable=not sys.stderr.isatty(), bar_format="{l_bar}{bar}| {elapsed}") as bar:

        def progress(what: str) -> None:
            bar.set_description_str(what, refresh=False)
            bar.update()

        samples = {"repeats": repeats, "warmup_seconds": timing.WARMUP_SECONDS, "cold_l2": cold_l2}
        return measure(case, ways, device, dtype, run=run, progress=progress, **samples)


class _Files:
    """What a run writes and reads; checked when it is made."""

    def __init__(self, request: BenchRequest) -> None:
        from datetime import UTC, datetime

        from stg_engine.bench import record

        self.record = record
        self.rows: list[StepRow] = []
        self.is_drawn = False
        self.run = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
        self.json, self.csv, self.plot = (_file(request, name) for name in ("json", "csv", "plot"))
        paths = [path.resolve() for path in (self.json, self.csv, self.plot) if path is not None]
        if len(set(paths)) < len(paths):
            raise ValueError("json, csv, plot: must be different files; one would replace the other")
        if os.environ.get("STG_ATTENTION"):
            raise ValueError(f"STG_ATTENTION={os.environ['STG_ATTENTION']} pins an attention backend; unset it")
        if self.csv is not None:
            record.read(self.csv, record.StepRow)
        self.write: Any = None
        if self.plot is not None:
            self.write = _plotter(self.plot)
        self.old = None if request.compare is None else self._old(Path(request.compare))

    def _old(self, path: Path) -> list[StepRow]:
        if path.suffix != ".csv":
            return self.record.from_json(path, self.record.StepRow)
        if not path.is_file():
            raise ValueError(f"compare={str(path)!r} is not allowed; there is no such file")
        return self.record.read(path, self.record.StepRow)

    def add(self, rows: list[StepRow]) -> None:
        """The rows of a case that is complete."""
        if self.csv is not None:
            self.record.append(self.csv, rows)
        self.rows += rows
        if self.json is not None:
            self.record.to_json(self.json, self.rows)

    def draw(self) -> None:
        if self.plot is not None and self.rows:
            self.write(self.rows, self.plot)
            self.is_drawn = True

    @property
    def written(self) -> str:
        """In words."""
        cases = dict.fromkeys(row.case for row in self.rows)
        paths = [path for path in (self.csv, self.json) if path is not None]
        if self.plot is not None and self.is_drawn:
            paths.append(self.plot)
        if not cases or not paths:
            return f"{len(self.rows)} rows measured, nothing was written"
        return f"{len(self.rows)} rows of {', '.join(cases)} are in {' and '.join(map(str, paths))}"


def _file(request: BenchRequest, name: str) -> Path | None:
    text = getattr(request, name)
    if text is None:
        return None
    path = Path(text)
    if not text or path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{name}={text!r} is not allowed; it must be a file in a folder that exists")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"{name}={text!r} is not allowed; it cannot be written")
    return path


def _plotter(path: Path) -> Any:
    from importlib.util import find_spec

    if path.suffix not in PLOTS:
        raise ValueError(f"plot={str(path)!r} is not allowed; it must end in one of {', '.join(PLOTS)}")
    if find_spec("matplotlib") is None:
        raise ValueError(f"plot={str(path)!r} needs matplotlib, which is not installed: pip install matplotlib")
    from stg_engine.bench import plots

    return plots.write
