"""Draw what the docs show: `python -m benchmarks.plots`, from results/steps.csv and the plans alone.

docs/images gets waterfall.svg, the README's case; steps.svg, over-tokens.svg and memory.svg, all cases of CUDA devices,
of CPUs while there are none; over-first-layer.svg. A picture without rows is taken away.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from stg_engine.bench import plots
from stg_engine.bench.case import KINDS
from stg_engine.bench.ladder import ladders
from stg_engine.bench.record import StepRow

FOLDER = "docs/images"
IMAGES = Path(__file__).parents[1] / FOLDER
NAMES = ("waterfall.svg", "steps.svg", "over-tokens.svg", "memory.svg", "over-first-layer.svg")
FIRST = "ltx-video-2b"


def pictured(rows: Sequence[StepRow]) -> list[StepRow]:
    """The rows of the README's case: LTX-Video 2B or the first one, published size before small before CPU."""
    groups = [list(ladder.rows) for ladder in ladders(rows)]
    return min(groups, key=lambda g: (KINDS.index(g[0].kind), not g[0].case.startswith(FIRST)), default=[])


def pictures(rows: Sequence[StepRow]) -> dict[str, tuple[Callable[..., Any], list[StepRow]]]:
    """File name -> how it is drawn, and the rows that it shows."""
    shown = [row for row in rows if record.is_cuda(row)] or list(rows)
    found = {
        "waterfall.svg": (plots.waterfall, pictured(rows)),
        "steps.svg": (plots.waterfall, shown),
        "over-tokens.svg": (plots.over_tokens, shown),
        "memory.svg": (plots.memory, [row for row in shown if row.peak_bytes is not None]),
        "over-first-layer.svg": (plots.over_first_layer, shown),
    }
    return {name: pair for name, pair in found.items() if pair[1] or name == "over-first-layer.svg"}


def stale(rows: Sequence[StepRow], folder: Path = IMAGES) -> list[str]:
    """Names of pictures that do not show these rows, are missing, or should not be there."""
    expected = {name: plots.digest(shown) for name, (_, shown) in pictures(rows).items()}
    files = {name: folder / name for name in NAMES}
    return [
        n
        for n, f in files.items()
        if f.exists() != (n in expected) or (f.exists() and expected[n] not in f.read_text())
    ]


def draw(rows: Sequence[StepRow], folder: Path = IMAGES) -> None:
    """Write every picture of these rows, and remove the others."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = pictures(rows)
    for name in NAMES:
        if name in expected:
            how, shown = expected[name]
            plots.write(shown, folder / name, how)
        else:
            (folder / name).unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, default=record.STEPS, help="rows of `stg-engine bench`")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    options = parser.parse_args()
    if not options.csv.is_file():
        parser.error(f"--csv: there is no file {options.csv}")
    draw(record.read(options.csv, StepRow), options.out)


if __name__ == "__main__":
    main()
