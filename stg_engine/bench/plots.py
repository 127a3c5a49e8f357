"""Pictures of measured steps, drawn from rows and plans alone.

The same rows give the same bytes. Shades differ in grayscale, too; exact and lossy variants never share a panel; error
bars are quartiles.
"""

from __future__ import annotations

import hashlib
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stg_engine.bench.ladder import BASELINES, BATCHED, CFG, COMPILED, ENGINE, SHARED, UNSHARED, Ladder, ladders
from stg_engine.bench.record import StepRow
from stg_engine.config import MODES, Skip
from stg_engine.models import supported
from stg_engine.plan import Plan
from stg_engine.presets import PRESETS, Preset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; lighter to darker is passes, engine.
GRAY, BLUE, ORANGE, INK = "#a6a6a6", "#0072b2", "#d55e00", "#222222"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "text.color": INK,
    "svg.hashsalt": "stg_engine",
    "hatch.linewidth": 0.6,
}
# Dates, versions and random ids would make the same rows another file.
FORMATS: dict[str, dict[str, Any]] = {
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}
Quartiles = tuple[float, float, float]
WIDTH = 8.0
"""Inches."""
OVER_TOKENS = {BATCHED: ("o", GRAY), COMPILED: ("s", INK), SHARED: ("^", ORANGE), ENGINE: ("D", BLUE)}

MODELS = {
    "ltx-video-2b": "ltx-video-2b",
    "ltx-video-13b": "ltx-video-13b",
    "ltx-2": "ltx-2.0",
    "mochi": "mochi",
    "cogvideox-2b": "cogvideox-2b",
    "cogvideox-5b": "cogvideox-5b",
    "hunyuan-video": "hunyuan-video",
    "wan-2.1-1.3b": "wan-2.1-1.3b-community",
    "wan-2.1-14b": "wan-2.1-14b-community",
}
"""Case -> preset with its layer."""


def waterfall(rows: Sequence[StepRow]) -> Figure:
    """Per case: seconds of each variant, how much faster than batched passes, and where sharing alone would be."""
    unit = f"seconds per guided step; right: speed-up over {BATCHED}"
    return _bars(rows, _seconds, unit, lambda batched, row: f"{batched / row:.2f}x")


def memory(rows: Sequence[StepRow]) -> Figure:
    """Per case: bytes that a step of each variant allocates at most beyond weights and inputs (CUDA)."""
    unit = f"GiB of a step at its peak, beyond weights and inputs; right: of {BATCHED}"
    return _bars(rows, _gibibytes, unit, lambda batched, row: f"{row / batched:.2f}")


def _seconds(row: StepRow) -> Quartiles:
    return row.low, row.seconds, row.high


def _gibibytes(row: StepRow) -> Quartiles | None:
    return None if row.peak_bytes is None else (row.peak_bytes / 2**30,) * 3


def over_tokens(rows: Sequence[StepRow]) -> Figure:
    """Seconds over ideal seconds, by tokens: what a step loses to launches, and to kernels below the ceilings."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    groups: dict[tuple[str, str], list[Ladder]] = {}
    for ladder in ladders(rows):
        if any(name in OVER_TOKENS for name in ladder.newest):
            groups.setdefault((ladder.rows[0].device, ladder.rows[0].dtype), []).append(ladder)
    figure, panels = _figure([1.0] * len(groups), 3.2 * len(groups), f"one of {', '.join(OVER_TOKENS)}")
    for axes, ((device, dtype), group) in zip(panels, groups.items(), strict=True):
        for variant, (marker, colour) in OVER_TOKENS.items():
            points = [ladder.newest[variant] for ladder in group if variant in ladder.newest]
            if points:
                low, middle, high = zip(*((r.low, r.seconds, r.high) for r in points), strict=True)
                ideal = [row.ideal_seconds for row in points]
                times = [m / i for m, i in zip(middle, ideal, strict=True)]
                below = [(m - b) / i for m, b, i in zip(middle, low, ideal, strict=True)]
                above = [(a - m) / i for a, m, i in zip(high, middle, ideal, strict=True)]
                tokens = [row.tokens for row in points]
                style: dict[str, Any] = {"fmt": marker, "color": colour, "markersize": 5, "label": variant}
                axes.errorbar(tokens, times, (below, above), markeredgecolor=INK, markeredgewidth=0.5, **style)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", ylabel="times the ideal step")
        axes.set_title(f"{device}, {dtype}", loc="left")
        for axis, ticks in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 1.2, 1.5, 2, 3, 5, 7))):
            axis.set_major_locator(LogLocator(subs=ticks))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_locator(NullLocator())
    panels[-1].set_xlabel("video tokens of a row")
    _legend(figure, panels)
    return _captioned(figure, [row for group in groups.values() for ladder in group for row in ladder.newest.values()])


def over_first_layer(rows: Sequence[StepRow]) -> Figure:
    """Pass-equivalents by the layer that is skipped, for each published model: by its plan, residual and attention.

    A measured point is the published plan's cost / the sharing efficiency of the model's case, the largest kind of it
    that was measured.
    """
    columns = 3
    lines = -(-len(MODELS) // columns)
    figure, panels = _figure([1.0] * lines, 1.7 * lines + 0.4, "", columns)
    drawn: list[StepRow] = []
    for axes, (model, name) in zip(panels, MODELS.items(), strict=False):
        preset = PRESETS[name]
        skip = _step(preset).skips[0]
        for mode, style in zip(MODES, ("-", ":"), strict=True):
            costs = [_plan(preset, (layer,), mode).pass_equivalents for layer in range(preset.blocks)]
            axes.plot(range(preset.blocks), costs, style, color=BLUE, linewidth=1.5, label=f"{mode} skip")
        plan = _plan(preset, skip.layers, skip.mode)
        cost, apart = plan.pass_equivalents, len(plan.branches)
        axes.plot(skip.layers[0], cost, "o", color=BLUE, markersize=6, markeredgecolor=INK, label="published")
        if (pair := _measured(model, rows)) is not None:
            (unshared, shared), efficiency = pair
            times = [u / s for u, s in ((unshared.low, shared.high), (unshared.high, shared.low))]
            middle = cost / efficiency
            worst, least = (middle * unshared.seconds / shared.seconds / ratio for ratio in times)
            error = ([max(0.0, middle - least)], [max(0.0, worst - middle)])
            axes.errorbar(
                [skip.layers[0]],
                [middle],
                error,
                fmt="D",
                fillstyle="none",
                color=ORANGE,
                markersize=8,
                label="measured",
            )
            drawn += [unshared, shared]
        axes.set(xlim=(0, preset.blocks - 1), ylim=(apart - 1.05, apart + 0.15))
        axes.set_title(f"{model}, {preset.blocks} blocks", loc="left")
    for axes in panels[len(MODELS) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel("pass-equivalents")
    _legend(figure, panels)
    for axes in panels[max(0, len(MODELS) - columns) : len(MODELS)]:
        axes.set_xlabel("layer that is skipped")
    return _captioned(
        figure,
        drawn,
        "Layers 0-based. Curves and dots: plans. Measured: the dot's cost / the sharing efficiency."
        if drawn
        else "Layers 0-based; plans, no measurement.",
    )


PLOTS: dict[str, Callable[[Sequence[StepRow]], Figure]] = {
    "waterfall": waterfall,
    "memory": memory,
    "over-tokens": over_tokens,
    "over-first-layer": over_first_layer,
}


def write(rows: Sequence[StepRow], path: Path | str, draw: Callable[[Sequence[StepRow]], Figure] = waterfall) -> None:
    """Draw to a PDF, PNG or SVG file. `ValueError` for another suffix and for rows that leave nothing to draw.

    `RuntimeError` without matplotlib. An SVG names its rows: `digest` of them is its identifier.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"plot={path.name!r} is not allowed: the name must end with one of {', '.join(FORMATS)}")
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        raise RuntimeError('plots need matplotlib: pip install "stg-engine[bench]"') from missing
    metadata = {**FORMATS[path.suffix], **({"Identifier": digest(rows)} if path.suffix == ".svg" else {})}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        try:
            draw(rows).savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def digest(rows: Sequence[StepRow]) -> str:
    """Changes with any number in the rows."""
    return "rows " + hashlib.sha256(repr([astuple(row) for row in rows]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Panel:
    """`rows` are drawn, of one kind; `everything` of the case sets the scale."""

    ladder: Ladder
    rows: list[StepRow]
    everything: list[StepRow]

    @property
    def is_exact(self) -> bool:
        return _belongs(self.rows[0])


def _belongs(row: StepRow) -> bool:
    """Beside exact variants stands plain CFG, which is no STG but says what STG adds."""
    return row.is_exact or row.variant == CFG


def _bars(
    rows: Sequence[StepRow],
    quartiles: Callable[[StepRow], Quartiles | None],
    unit: str,
    compare: Callable[[float, float], str],
) -> Figure:
    """A panel of bars for each case, and one below it for its lossy variants.

    On the right stands `compare` of the batched passes and a row, medians of one run.
    """
    panels = []
    for ladder in ladders(rows):
        shown = [row for row in ladder.newest.values() if quartiles(row) is not None]
        kinds = ([row for row in shown if _belongs(row) == is_exact] for is_exact in (True, False))
        panels += [_Panel(ladder, kind, shown) for kind in kinds if kind]
    counts = [float(len(panel.rows)) for panel in panels]
    figure, all_axes = _figure(counts, 0.25 * sum(counts) + 0.75 * len(counts), unit)
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_bars(axes, panel, quartiles)
        for place, row in enumerate(panel.rows):
            text = _compared(panel.ladder, row, quartiles, compare)
            axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        batched, bound = panel.ladder.newest.get(BATCHED), panel.ladder.bound
        if quartiles is _seconds and panel.is_exact and batched is not None and bound is not None:
            axes.axvline(batched.seconds / bound, color=INK, linewidth=1, linestyle="--")
            axes.set_title(f"{axes.get_title('left')}\ndashed: {BATCHED} / {bound:.2f}, sharing alone", loc="left")
    all_axes[-1].set_xlabel(unit)
    return _captioned(figure, [row for panel in panels for row in panel.rows])


def _draw_bars(axes: Axes, panel: _Panel, quartiles: Callable[[StepRow], Quartiles | None]) -> None:
    row = panel.rows[0]
    axes.set_title(f"{row.title} ({row.case}), {row.dtype}{'' if panel.is_exact else '; LOSSY'}", loc="left")
    for place, row in enumerate(panel.rows):
        low, middle, high = quartiles(row) or (0.0, 0.0, 0.0)
        colour = GRAY if row.variant in BASELINES else BLUE if panel.is_exact else ORANGE
        style: dict[str, Any] = {
            "color": "white" if row.variant == CFG else colour,
            "edgecolor": colour if panel.is_exact else INK,
        }
        error = ([middle - low], [high - middle]) if high > low else None
        hatch = None if panel.is_exact else "//"
        axes.barh(place, middle, 0.7, xerr=error, hatch=hatch, error_kw={"ecolor": INK, "elinewidth": 1}, **style)
    # Seconds of two runs are no ratio: bars beside which the batched passes were not measured say so.
    run = panel.ladder.newest.get(BATCHED, row).run
    names = [row.variant if row.run == run else f"{row.variant} (other run)" for row in panel.rows]
    axes.set_yticks(range(len(panel.rows)), names)
    axes.set_ylim(len(panel.rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.05 * max(high for _, _, high in filter(None, map(quartiles, panel.everything))))
    axes.tick_params(axis="y", length=0)


def _compared(
    ladder: Ladder,
    row: StepRow,
    quartiles: Callable[[StepRow], Quartiles | None],
    compare: Callable[[float, float], str],
) -> str:
    pair = ladder.pair(BATCHED, row.variant)
    if row.variant == CFG:
        return "no STG"
    values = [] if pair is None else [values[1] for values in map(quartiles, pair) if values is not None]
    text = compare(*values) if len(values) == 2 and all(values) else ""
    return text if row.is_exact else f"{text}\nc - p {row.delta_error:.1%} off"


def _figure(heights: list[float], inches: float, what: str, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, line by line. `ValueError` if there are none."""
    if not heights:
        raise ValueError(f"rows: none of them has {what}; there is nothing to draw")
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, inches + 0.7), layout="constrained")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One above all panels."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=4, frameon=False)


def _captioned(figure: Figure, rows: Sequence[StepRow], note: str = "") -> Figure:
    """Where and when: every device, dtype, commit and date among the rows."""
    if rows:
        device, dtype, torch, commit, date = (
            ", ".join(dict.fromkeys(str(getattr(row, name)) for row in rows))
            for name in ("device", "dtype", "torch", "commit", "date")
        )
        samples = sorted({row.samples for row in rows})
        count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
        note += f" {device}; {dtype}; torch {torch}; commit {commit}; {date}; median of {count}, quartiles."
    figure.supxlabel("\n".join(textwrap.wrap(note.strip(), 140)), x=0.01, ha="left", fontsize=7.5)
    return figure


def _step(preset: Preset) -> Any:
    """The guidance of a step; of a schedule that with the largest guidance scale."""
    schedule = preset.config.schedule
    if schedule is None:
        return preset.config.at(progress=preset.config.start, sigma=None)
    return preset.config.of_entry(max(schedule.entries, key=lambda entry: entry.guidance_scale or 0))


def _plan(preset: Preset, layers: tuple[int, ...], mode: str) -> Plan:
    (spec,) = (spec for spec in supported() if spec.transformer == preset.transformer)
    step = replace(_step(preset), skips=(Skip(layers, mode=mode),))
    return Plan.build(step, preset.blocks, uncond=preset.guidance_scale > 1, **spec.plan_options(is_on=True))


def _measured(model: str, rows: Sequence[StepRow]) -> tuple[tuple[StepRow, ...], float] | None:
    """Rows without and with sharing of this model's case, and its sharing efficiency."""
    for suffix in ("", "-small", "-cpu"):
        for ladder in reversed(ladders([row for row in rows if row.case == model + suffix])):
            pair, efficiency = ladder.pair(UNSHARED, SHARED), ladder.sharing_efficiency
            if pair is not None and efficiency is not None:
                return pair, efficiency
    return None
