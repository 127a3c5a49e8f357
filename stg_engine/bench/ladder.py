"""The variants of a case beside each other: the newest row of each, and ratios of rows from one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from stg_engine.bench.record import StepRow

CFG, BATCHED, COMPILED = "cfg", "batched-passes", "compiled-passes"
UNSHARED, SHARED, ENGINE, GRAPH = "engine-unshared", "engine-shared", "engine", "engine-graph"
GRAPHS = (GRAPH, "engine-compiled-graph")
BASELINES = (CFG, BATCHED, "sequential-passes", "best-attention", COMPILED, "max-autotune-passes")
ORDER = (
    *BASELINES,
    UNSHARED,
    SHARED,
    "engine-kernels",
    ENGINE,
    GRAPH,
    "engine-compiled",
    "engine-compiled-graph",
    "engine-serial",
    "float8-engine",
)
"""One technique more at a time, plain passes first."""


@dataclass(frozen=True)
class Ladder:
    """All rows of one case, dtype, device, number of threads and state of the cache, oldest first."""

    rows: tuple[StepRow, ...]

    @cached_property
    def newest(self) -> dict[str, StepRow]:
        """Each variant's last row, by `ORDER`; names that are not in it come last."""
        rows = {row.variant: row for row in self.rows}
        return dict(sorted(rows.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER)))

    def pair(self, *variants: str) -> tuple[StepRow, ...] | None:
        """The rows of these variants in the newest run that has them all."""
        for run in reversed(list(dict.fromkeys(row.run for row in self.rows))):
            rows = {row.variant: row for row in self.rows if row.run == run}
            if set(variants) <= set(rows):
                return tuple(rows[variant] for variant in variants)
        return None

    def ratio(self, slow: str, fast: str) -> float | None:
        """Seconds of one variant over those of another, in one run."""
        pair = self.pair(slow, fast)
        return None if pair is None else pair[0].seconds / pair[1].seconds

    @property
    def bound(self) -> float | None:
        """Block-rows of plain passes over those with sharing: what sharing alone can give over such passes.

        A row's own `bound` is over "engine-unshared", which leaves out the skipped blocks.
        """
        plain = [row.block_rows for name, row in self.newest.items() if name in BASELINES and name != CFG]
        shared = [row.block_rows for name, row in self.newest.items() if name not in (*BASELINES, UNSHARED)]
        return plain[-1] / shared[-1] if plain and shared else None

    @property
    def sharing_efficiency(self) -> float | None:
        """(seconds of "engine-unshared" / seconds of "engine-shared") / (block-rows of the first / of the second)."""
        pair = self.pair(UNSHARED, SHARED)
        if pair is None:
            return None
        unshared, shared = pair
        return unshared.seconds / shared.seconds / (unshared.block_rows / shared.block_rows)

    @property
    def best(self) -> StepRow | None:
        """The newest row of the exact engine variant that gains most over batched passes of its own run."""
        engines = [name for name, row in self.newest.items() if row.is_exact and name not in BASELINES]
        gains = {name: self.ratio(BATCHED, name) for name in engines}
        measured = {name: gain for name, gain in gains.items() if gain is not None}
        return self.newest[max(measured, key=lambda name: measured[name])] if measured else None

    @property
    def gain_over_compiled(self) -> float | None:
        """The best exact engine variant against the faster form of compiled passes, each measured beside it.

        Without CUDA graphs, which compiled passes do not have either.
        """
        compiled = [name for name in (COMPILED, "max-autotune-passes") if name in self.newest]
        engines = [name for name, row in self.newest.items() if row.is_exact and name not in (*BASELINES, *GRAPHS)]
        gains = [[self.ratio(slow, fast) for slow in compiled] for fast in engines]
        measured = [min(g for g in gain if g is not None) for gain in gains if gain and None not in gain]
        return max(measured, default=None)


def ladders(rows: Sequence[StepRow]) -> list[Ladder]:
    """By the order in which cases first appear."""
    groups: dict[tuple[str, str, str, int, bool], list[StepRow]] = {}
    for row in rows:
        groups.setdefault((row.device, row.dtype, row.case, row.threads, row.cold_l2), []).append(row)
    return [Ladder(tuple(group)) for group in groups.values()]
