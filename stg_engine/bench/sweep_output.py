"""A layer sweep's rows as a table and as a picture, from the rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from stg_engine.bench.record import read
from stg_engine.bench.sweep import SHARES, SweepRow

WIDTH = 120
NOISE = 2.0
"""Standard errors below which a difference is noise."""
RANDOM = "Weights are random: cost is that of the architecture, delta says nothing of a real checkpoint."
COST = (
    "passes: block-rows / blocks. ms: of a guided step of one video. x CFG: over the first row's in the same round, "
    "median (quartiles). "
    "|c-p|/|c|: how far the skip moves the prediction, mean (least to most over noise levels); /|c-u|: over what CFG "
    "moves it."
)
UNJUDGED = "Only clips say which layer is best: a larger delta is a stronger push, not a better one."
JUDGED = (
    "all: share of clips in which the whole caption holds. overlap: with the ideal shape, 0 to 1; edge: change of "
    "coverage per pixel across the outline, more is sharper; stray: coloured pixels per frame outside the shapes. The "
    "first row's own values, below it the change on the same captions and noise, ± one standard error: changes below "
    "two are noise. best: the largest gain of edge among layers that make nothing else worse by more than noise; as "
    "good: not told from it. The model is a toy: its best layer says nothing about another model's."
)


def losses(row: SweepRow) -> list[str]:
    """What the layer makes worse by more than noise, beside edge."""
    gains = (
        ("captions", row.all_gain, row.all_gain_error),
        ("overlap", row.iou_gain, row.iou_gain_error),
        ("stray", None if row.stray_gain is None else -row.stray_gain, row.stray_gain_error),
    )
    return [name for name, gain, error in gains if gain is not None and error is not None and gain < -NOISE * error]


def verdicts(rows: Sequence[SweepRow]) -> dict[str, str]:
    """By name of a layer's row: "best", "as good", "worse: ..." or "", see JUDGED; empty where no clips were judged."""
    layers = [row for row in rows if row.layer is not None and row.clips]
    result = {row.name: f"worse: {', '.join(losses(row))}" if losses(row) else "" for row in layers}
    fair = [row for row in layers if not losses(row) and _edge_gain(row) > NOISE * (row.edge_gain_error or math.inf)]
    if fair:
        best = max(fair, key=_edge_gain)
        for row in fair:
            error = math.hypot(row.edge_gain_error or 0.0, best.edge_gain_error or 0.0)
            result[row.name] = "as good" if _edge_gain(best) - _edge_gain(row) < NOISE * error else ""
        result[best.name] = "best"
    return result


def _edge_gain(row: SweepRow) -> float:
    return -math.inf if row.edge_gain is None else row.edge_gain


def ranked(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Rows without a skip, then, where clips were judged, layers best first, those that lose something last."""
    found = verdicts(rows)
    layers = [row for row in rows if row.layer is not None]
    if found:
        layers.sort(key=lambda row: (bool(losses(row)), -_edge_gain(row)))
    return [*(row for row in rows if row.layer is None), *layers]


def table(rows: Sequence[SweepRow]) -> str:
    """What a person reads: setting, a line per row, how to read it."""
    found, is_judged = verdicts(rows), any(row.clips for row in rows)
    lines = [["", "passes", "ms", "x CFG", "|c-p|/|c|", "/|c-u|"]]
    lines[0] += ["all", "overlap", "edge", "stray", ""] if is_judged else []
    lines += [[*_cost_cells(row), *(_clip_cells(row, found) if is_judged else [])] for row in ranked(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [COST, JUDGED if is_judged else UNJUDGED, *([RANDOM] if rows[0].weights == "random" else [])]
    return "\n".join([fill(_setting(rows), WIDTH), "", *text, "", *(fill(note, WIDTH) for note in notes)])


def _setting(rows: Sequence[SweepRow]) -> str:
    row = next(row for row in rows if row.layer is not None)
    kind = " ".join(filter(None, (row.axis, row.mode)))
    clips = f", {row.clips} clips of {row.steps} steps" if row.clips else ""
    cfg = f"CFG {row.guidance_scale:g}" if row.guidance_scale > 1 else "no CFG"
    return (
        f"{row.model}, {row.blocks} layers: {kind} skip at scale {row.stg_scale:g}, {cfg}{clips}, {row.samples} timed "
        f"steps per row ({row.device}, threads: {row.threads}, {row.dtype}; blocks of layers: {row.kernels})"
    )


def _cost_cells(row: SweepRow) -> list[str]:
    has_delta = row.delta is not None
    return [
        row.name,
        f"{row.pass_equivalents:.2f}",
        f"{row.seconds * 1e3:.1f}",
        f"{row.of_cfg:.2f} ({row.of_cfg_low:.2f}-{row.of_cfg_high:.2f})",
        f"{row.delta:.2f} ({row.delta_low:.2f}-{row.delta_high:.2f})" if has_delta else "",
        "" if row.delta_of_cfg is None else f"{row.delta_of_cfg:.2f}",
    ]


def _clip_cells(row: SweepRow, found: dict[str, str]) -> list[str]:
    cells = [f"{row.all:.0%} ± {row.all_error:.0%}"]
    for name, digits in (("iou", 3), ("edge", 3), ("stray", 2)):
        gain, error = getattr(row, f"{name}_gain"), getattr(row, f"{name}_gain_error")
        if gain is None:
            gain, error = getattr(row, name), getattr(row, f"{name}_error")
            cells.append("" if gain is None or error is None else f"{gain:.{digits}f} ± {error:.{digits}f}")
        else:
            cells.append(f"{gain:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}"))
    return [*cells, found.get(row.name, "")]


def plot(csv: str | Path, png: str | Path, force: bool = False) -> None:
    """Cost, delta and, where clips were judged, caption accuracy and edge over layers, from the CSV file alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from stg_engine import media

    rows = read(Path(csv), SweepRow)
    layers = [row for row in rows if row.layer is not None]
    panels: list[tuple[str, str, str | None, str | None]] = [
        (f"seconds of a step over {rows[0].name} (quartiles)", "of_cfg", "of_cfg_low", "of_cfg_high"),
        ("|c - p| / |c| (over noise levels)", "delta", "delta_low", "delta_high"),
    ]
    if any(row.clips for row in layers):
        panels += [("captions that hold (± s.e.)", "all", None, None)]
        panels += [(f"edge, change from {rows[0].name} (± s.e.)", "edge_gain", None, None)]
    figure = Figure(figsize=(8.0, 2.6 * ((len(panels) + 1) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_setting(rows).split(" (")[0], fontsize=9)
    for axes, (title, name, low, high) in zip(figure.subplots(len(panels) // 2, 2).flat, panels, strict=True):
        _panel(axes, rows, layers, name, low, high)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("layer")
    with media.all_or_nothing([Path(png)], force) as (part,):
        figure.savefig(part, format="png", dpi=150, metadata={"Software": None})


def _panel(axes: Any, rows: Sequence[SweepRow], layers: Sequence[SweepRow], name: str, low: Any, high: Any) -> None:
    shown = [row for row in layers if getattr(row, name) is not None]
    values = [getattr(row, name) for row in shown]
    if low is not None:
        ends = [[getattr(row, end) for row in shown] for end in (low, high)]
        bars: Any = [[abs(v - e) for v, e in zip(values, end, strict=True)] for end in ends]
    else:
        errors = [getattr(row, f"{name}_error") or 0.0 for row in shown]
        top = 1.0 if name in SHARES else math.inf
        bars = [errors, [min(error, top - value) for error, value in zip(errors, values, strict=True)]]
    axes.errorbar([row.layer for row in shown], values, yerr=bars, fmt="o", markersize=4, capsize=2, color="#0072b2")
    for row, style in zip((row for row in rows if row.layer is None), ("-", ":"), strict=False):
        value = 0.0 if name == "edge_gain" and row is rows[0] else getattr(row, name)
        if value is not None:
            axes.axhline(value, linestyle=style, linewidth=1, color="#a6a6a6", label=row.name)
    if name == "of_cfg":
        axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
