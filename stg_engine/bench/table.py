"""Rows for people: a table per case, and new rows beside old ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

from stg_engine.bench.cost import TOLERANCE, Ceilings, disagreement
from stg_engine.bench.record import StepRow
from stg_engine.bench.variants import BATCHED, SHARED, UNSHARED, VARIANTS

WIDTH = 120
HEADS = (
    "variant",
    "ms (quartiles)",
    f"x {BATCHED}",
    "x over",
    "bound",
    "efficiency",
    "of ideal",
)
FURTHER_HEADS = ("variant", "first call", "memory", "launches", "error / budget", "c - p / budget")
LOSSY_HEADS = ("lossy variant", "ms (quartiles)", f"x {BATCHED}", "memory", "error", "error of c - p")
ALIKE = ("device", "threads", "dtype", "tokens", "cold_l2")
"""What rows must have in common to be called faster or slower."""
FEWEST = 4
"""Samples that have quartiles of their own."""
BEFORE = {
    "sequential-passes": BATCHED,
    "best-attention": BATCHED,
    "compiled-passes": "best-attention",
    "max-autotune-passes": "compiled-passes",
    UNSHARED: BATCHED,
    SHARED: UNSHARED,
    "engine-kernels": SHARED,
    "engine": "engine-kernels",
    "engine-graph": "engine",
    "engine-compiled": SHARED,
    "engine-compiled-graph": "engine-compiled",
    "engine-serial": "engine",
}
"""The variant that has one technique less."""
LEGEND = fill(
    f"x: how many times faster; x over: than the variant with one technique less. bound: block-rows of {UNSHARED} over "
    f"these, what sharing alone can give; efficiency: what was gained over {UNSHARED}, of that. of ideal: the cost "
    "model's time over the measured one. first call: with compilation, capture and tuning. error: |y - exact| / "
    "|exact| of the guided prediction y, exact being the same weights in twice the precision; c - p: the same of what "
    "STG adds; budget: twice that of plain passes.",
    WIDTH,
    break_on_hyphens=False,
)


def case_table(rows: Sequence[StepRow], without: Mapping[str, str]) -> str:
    """All variants of one case in one run: exact ones as a ladder, lossy ones apart, reasons of those without a row."""
    by_name = {row.variant: row for row in rows}
    exact = [row for row in rows if row.is_exact]
    lines = [_head(rows[0]), ""] if rows else []
    if exact:
        lines += _columns(_known([HEADS, *(_exact_cells(row, by_name) for row in exact)]))
        lines += ["", *_columns(_known([FURTHER_HEADS, *(_further_cells(row) for row in exact)]))]
    lossy = [_lossy_cells(row, by_name) for row in rows if not row.is_exact]
    lines += ["", *_columns([LOSSY_HEADS, *lossy])] if lossy else []
    ran: dict[str, list[str]] = {}
    for row in rows:
        ran.setdefault(f"{row.kernels}; attention: {row.attention}", []).append(row.variant)
    what_ran = (fill(f"{', '.join(names)}: {what}", WIDTH, break_on_hyphens=False) for what, names in ran.items())
    lines += ["", *what_ran] if rows else []
    lines += ["", *(f"- {name}: {reason}" for name, reason in without.items())] if without else []
    apart = [f"{row.variant} {row.seconds / row.ideal_seconds:.2f}x" for row in rows if is_apart(row)]
    if apart:
        text = f"More than {TOLERANCE:.0%} from the cost model, which counts no launches: {', '.join(apart)} its time."
        lines += ["", fill(text, WIDTH, break_on_hyphens=False)]
    return "\n".join(lines)


def is_apart(row: StepRow) -> bool:
    """True if model and measurement differ by more than the model claims."""
    return bool(disagreement(row.seconds, row.ideal_seconds))


def variants_table() -> str:
    """Names and titles of all variants."""
    return "\n".join(_columns([(name, variant.title) for name, variant in VARIANTS.items()]))


def comparison(new: Sequence[StepRow], old: Sequence[StepRow]) -> str:
    """Per case and variant in both: new seconds over old ones, what the quartiles make of that, and a verdict.

    The last old row counts. Rows of another machine or dtype have a ratio and no verdict.
    """
    before = {(row.case, row.variant): row for row in old}
    pairs = [(row, before[row.case, row.variant]) for row in new if (row.case, row.variant) in before]
    if not pairs:
        return "No case and variant is in both."
    lines = _columns([("case", "variant", "new / old", "spread", ""), *(_compared(*pair) for pair in pairs)])
    for field in (*ALIKE, "torch", "driver"):
        changes = dict.fromkeys((getattr(b, field), getattr(a, field)) for a, b in pairs)
        lines += [f"{field} differs: {was} was, {now} is" for was, now in changes if was != now]
    return "\n".join(lines)


def ratio(new: StepRow, old: StepRow) -> tuple[float, float, float]:
    """New seconds over old ones, and the least and the most that the quartiles allow."""
    return new.seconds / old.seconds, new.low / old.high, new.high / old.low


def _compared(new: StepRow, old: StepRow) -> tuple[str, ...]:
    middle, low, high = ratio(new, old)
    verdict = "faster" if high < 1 else "slower" if low > 1 else "within the spread"
    if min(new.samples, old.samples) < FEWEST:
        verdict = f"fewer than {FEWEST} samples: no verdict"
    if any(getattr(new, field) != getattr(old, field) for field in ALIKE):
        verdict = "not alike: no verdict"
    return new.case, new.variant, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", verdict


def _head(row: StepRow) -> str:
    clock = "" if row.clock_mhz is None else f" at {row.clock_mhz} MHz"
    driver = f", driver {row.driver}, CUDA {row.cuda}, cuDNN {row.cudnn}" if row.cuda and row.driver else ""
    return (
        f"{row.case}: {row.title}, {row.tokens} tokens, {row.dtype}, median of {row.samples}\n"
        f"{row.device}{clock}, threads: {row.threads}{driver}, torch {row.torch}, commit {row.commit}\n"
        f"ceilings: {Ceilings(row.matmul_flops, row.attention_ceiling, row.copy_bytes)}"
    )


def _exact_cells(row: StepRow, by_name: Mapping[str, StepRow]) -> tuple[str, ...]:
    unshared = by_name.get(UNSHARED)
    # CFG does less, and passes have no plan: neither has a bound to be held to.
    has_plan = row.variant.startswith("engine")
    efficiency = unshared.seconds / row.seconds / row.bound if unshared is not None and has_plan else None
    return (
        row.variant,
        _milliseconds(row),
        _faster(by_name.get(BATCHED), row),
        _over(row, by_name),
        f"{row.bound:.3f}" if has_plan else "-",
        "-" if efficiency is None else f"{efficiency:.3f}",
        f"{row.ideal_seconds / row.seconds:.2f}",
    )


def _further_cells(row: StepRow) -> tuple[str, ...]:
    return (
        row.variant,
        f"{row.cold_seconds:.2f} s",
        _mebibytes(row.peak_bytes),
        "-" if row.launches is None else str(row.launches),
        _of_budget(row.error, row.budget),
        _of_budget(row.delta_error, row.delta_budget),
    )


def _lossy_cells(row: StepRow, by_name: Mapping[str, StepRow]) -> tuple[str, ...]:
    return (
        row.variant,
        _milliseconds(row),
        _faster(by_name.get(BATCHED), row),
        _mebibytes(row.peak_bytes),
        f"{row.error:.1e}",
        f"{row.delta_error:.1e}",
    )


def _over(row: StepRow, by_name: Mapping[str, StepRow]) -> str:
    before = BEFORE.get(row.variant)
    while before is not None and before not in by_name:
        before = BEFORE.get(before)
    return "-" if before is None else f"{_faster(by_name[before], row)} {before}"


def _milliseconds(row: StepRow) -> str:
    return f"{row.seconds * 1e3:.4g} ({row.low * 1e3:.4g} to {row.high * 1e3:.4g})"


def _faster(slow: StepRow | None, fast: StepRow) -> str:
    return "-" if slow is None or slow is fast else f"{slow.seconds / fast.seconds:.3f}"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f} MiB"


def _of_budget(error: float, budget: float | None) -> str:
    return f"{error:.1e}" if budget is None else f"{error:.1e} / {budget:.1e}"


def _known(table: Sequence[Sequence[str]]) -> list[list[str]]:
    """Without columns in which no row has a value, as memory and launches on a CPU."""
    kept = [i for i in range(len(table[0])) if any(line[i] != "-" for line in table[1:])]
    return [[line[i] for i in kept] for line in table]


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
