"""What measured steps say, as Markdown: a table for each device and dtype, a picture, and the goals.

Every ratio is of two rows of one run; a cell in milliseconds is the newest row of its variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.plots import FOLDER, pictured
from benchmarks.record import is_cuda
from stg_engine.bench.ladder import BATCHED, COMPILED, ENGINE, GRAPH, SHARED, UNSHARED, Ladder, ladders
from stg_engine.bench.record import StepRow

NO_CUDA = "No CUDA device has been measured yet."
COLUMNS = (
    "case",
    "batched passes",
    "compiled passes",
    "engine, unshared",
    "engine, shared",
    "engine",
    "fastest",
    "speed-up",
    "bound",
    "sharing efficiency",
    "of ideal",
)


def speed_tables(rows: Sequence[StepRow]) -> str:
    """Per device, dtype and number of threads: a line for each case, CUDA devices first."""
    groups: dict[tuple[bool, str], list[Ladder]] = {}
    for ladder in ladders(rows):
        row = ladder.rows[-1]
        threads = "" if is_cuda(row) else f", {row.threads} thread{'s' * (row.threads > 1)}"
        groups.setdefault((not is_cuda(row), f"{row.device}{threads}, {row.dtype}"), []).append(ladder)
    parts = [] if any(map(is_cuda, rows)) else [NO_CUDA]
    for (_, where), group in sorted(groups.items()):
        newest = [row for ladder in group for row in ladder.newest.values()]
        torch, commit = (", ".join(dict.fromkeys(getattr(r, name) for r in newest)) for name in ("torch", "commit"))
        lines = [f"{where}, torch {torch}, commit {commit}:", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(_cells(ladder))} |" for ladder in group]
        parts.append("\n".join(lines))
    if rows:
        parts.append(f"![Seconds per guided step, by variant]({FOLDER}/waterfall.svg)\n\n{_caption(rows)}")
    return "\n\n".join(parts)


def _caption(rows: Sequence[StepRow]) -> str:
    row = pictured(rows)[0]
    kind = ", a version for CPUs" if row.kind == "cpu" else ""
    return f"{row.title}{kind}; {row.device}, {row.dtype}."


def _cells(ladder: Ladder) -> list[str]:
    best, shown = ladder.best, ladder.newest
    engine = shown.get(ENGINE)
    return [
        f"{ladder.rows[-1].title} (`{ladder.rows[-1].case}`)",
        *(_milliseconds(shown.get(name)) for name in (BATCHED, COMPILED, UNSHARED, SHARED, ENGINE)),
        "-" if best is None else f"`{best.variant}`, {_milliseconds(best)}",
        _number(ladder.ratio(BATCHED, ENGINE), "x"),
        _number(ladder.bound, "x"),
        _number(ladder.sharing_efficiency, digits=3),
        _number(None if engine is None else engine.ideal_seconds / engine.seconds),
    ]


def _milliseconds(row: StepRow | None) -> str:
    return "-" if row is None else f"{row.seconds * 1e3:,.{0 if row.seconds >= 0.1 else 1}f} ms"


def _number(value: float | None, unit: str = "", digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


@dataclass(frozen=True)
class Goal:
    """`value` of a case must be at least `least`, or at most `most`; None where it was not measured."""

    words: str
    kinds: tuple[str, ...]
    value: Callable[[Ladder], float | None]
    least: float = 0.0
    most: float = float("inf")
    digits: int = 2
    needs_cuda: bool = True

    def verdict(self, cases: Sequence[Ladder]) -> str:
        """The value of the worst case, and whether it is good enough."""
        values = {ladder: value for ladder in cases if (value := self._of(ladder)) is not None}
        if not values:
            return "not measured"
        worst = (max if self.least == 0.0 else min)(values, key=lambda ladder: values[ladder])
        met = sum(self.least <= value <= self.most for value in values.values())
        end = "met" if met == len(values) else f"met in {met} of {len(values)}" if met else "not met"
        return f"{values[worst]:.{self.digits}f} ({worst.rows[0].case}): {end}"

    def _of(self, ladder: Ladder) -> float | None:
        return self.value(ladder) if ladder.rows[0].kind in self.kinds else None


def _over_compiled_bound(ladder: Ladder) -> float | None:
    gain, bound = ladder.gain_over_compiled, ladder.bound
    return None if gain is None or bound is None else gain / bound


def _over_ideal(ladder: Ladder) -> float | None:
    engine = ladder.newest.get(ENGINE)
    return None if engine is None else engine.seconds / engine.ideal_seconds


GOALS = (
    Goal(
        "sharing efficiency at least 0.97 of the bound",
        ("true", "cpu"),
        lambda ladder: ladder.sharing_efficiency,
        least=0.97,
        digits=3,
        needs_cuda=False,
    ),
    Goal(
        "speed-up over compiled passes with the best attention: at least 1.0 times the bound",
        ("true", "cpu"),
        _over_compiled_bound,
        least=1.0,
        needs_cuda=False,
    ),
    Goal("a step at most 1.10 times the ideal one", ("true", "cpu"), _over_ideal, most=1.1, needs_cuda=False),
    Goal(
        "CUDA graphs at least 1.5 times faster where launches dominate",
        ("small",),
        lambda ladder: ladder.ratio(ENGINE, GRAPH),
        least=1.5,
    ),
)


def goals_table(rows: Sequence[StepRow]) -> str:
    """Each goal with its worst case on CUDA devices, and on CPUs where it says something there."""
    cases = ladders(rows)
    cuda, cpu = ([c for c in cases if is_cuda(c.rows[0]) is wanted] for wanted in (True, False))
    lines = ["| goal | worst case on CUDA | worst case on a CPU |", "|---|---|---|"]
    lines += [f"| {g.words} | {g.verdict(cuda)} | {'-' if g.needs_cuda else g.verdict(cpu)} |" for g in GOALS]
    return "\n".join(lines)
