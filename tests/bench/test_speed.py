"""The README's tables of measured steps, its goals and its pictures, from made-up rows."""

from dataclasses import replace

import pytest
from bench.made_up import ladder_rows, step_row

from benchmarks import plots, speed

GPU = ladder_rows()
CPU = [
    replace(row, device="Made-up CPU, 2 cores", case="mochi-cpu", kind="cpu", title="Mochi", peak_bytes=None)
    for row in GPU
    if row.variant in ("batched-passes", "engine-unshared", "engine-shared", "engine")
]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(text, case):
    """Column -> cell of the line that names `case`."""
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("| case"))
    return dict(zip(cells(header), cells(next(line for line in lines if f"`{case}`" in line)), strict=True))


def test_table_of_a_case():
    assert table(speed.speed_tables(GPU), "ltx-video-2b") == {
        "case": "LTX-Video 2B, 768x512x121 (`ltx-video-2b`)",
        "batched passes": "300 ms",
        "compiled passes": "215 ms",
        "engine, unshared": "262 ms",
        "engine, shared": "201 ms",
        "engine": "160 ms",
        "fastest": "`engine-graph`, 158 ms",
        "speed-up": "1.88x",
        "bound": "1.31x",
        "sharing efficiency": "1.005",
        "of ideal": "0.69",
    }


def test_what_was_not_measured_is_a_dash():
    row = table(speed.speed_tables(CPU), "mochi-cpu")
    assert row["compiled passes"] == "-"
    alone = table(speed.speed_tables([step_row("engine")]), "ltx-video-2b")
    assert (alone["speed-up"], alone["sharing efficiency"], alone["fastest"]) == ("-", "-", "-")


def test_a_lossy_variant_is_never_the_fastest():
    row = table(speed.speed_tables([step_row("batched-passes"), step_row("float8-engine")]), "ltx-video-2b")
    assert row["fastest"] == "-"


def test_cuda_stands_first_and_says_where():
    text = speed.speed_tables([*CPU, *GPU])
    assert text.index("Made-up GPU, bfloat16, torch 2.13.0, commit abc1234:") < text.index(
        "Made-up CPU, 2 cores, 1 thread"
    )
    assert speed.NO_CUDA not in text
    assert "LTX-Video 2B, 768x512x121; Made-up GPU, bfloat16." in text


@pytest.mark.parametrize("rows", [[], CPU])
def test_no_cuda_device_is_said(rows):
    assert speed.speed_tables(rows).startswith(speed.NO_CUDA)
    assert ("Mochi, a version for CPUs; Made-up CPU" in speed.speed_tables(rows)) is bool(rows)


def verdicts(rows):
    return [cells(line)[1:] for line in speed.goals_table(rows).splitlines()[2:]]


def test_goals_without_rows_are_not_measured():
    assert verdicts([]) == [*[["not measured", "not measured"]] * 3, ["not measured", "-"]]


def test_goals_are_judged_by_the_worst_case():
    small = ladder_rows(case="mochi-small", kind="small")
    bad = [
        step_row("engine-unshared", case="mochi", seconds=83.0),
        step_row("engine-shared", case="mochi", seconds=80.0),
    ]
    efficiency, compiled, ideal, graphs = verdicts([*GPU, *bad, *CPU, *small])
    assert efficiency == ["0.800 (mochi): met in 1 of 2", "1.005 (mochi-cpu): met"]
    assert compiled == ["1.01 (ltx-video-2b): met", "not measured"]
    assert ideal == ["1.45 (ltx-video-2b): not met", "1.45 (mochi-cpu): not met"]
    assert graphs == ["1.01 (mochi-small): not met", "-"]


def test_the_picture_is_of_a_published_size_on_cuda_if_there_is_one():
    other, small = ladder_rows(case="mochi"), ladder_rows(case="ltx-video-2b-small", kind="small")
    assert plots.pictured([*CPU, *small, *other, *GPU]) == GPU
    assert plots.pictured([*CPU, *small]) == small
    assert plots.pictured([]) == []


def test_pictures_are_drawn_and_taken_away(tmp_path):
    rows = [*GPU, *CPU]
    assert plots.stale(rows, tmp_path) == list(plots.NAMES)
    plots.draw(rows, tmp_path)
    assert plots.stale(rows, tmp_path) == []
    changed = [*rows[:-1], replace(rows[-1], commit="def5678"), replace(GPU[0], seconds=1.0)]
    assert plots.stale(changed, tmp_path) == list(plots.NAMES)
    assert plots.stale([], tmp_path) == list(plots.NAMES)
    plots.draw([], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["over-first-layer.svg"]
    assert plots.stale([], tmp_path) == []


def test_pictures_show_cuda_alone_if_there_is_one():
    shown = plots.pictures([*CPU, *GPU])
    assert shown["steps.svg"][1] == GPU
    assert plots.pictures(CPU)["steps.svg"][1] == CPU
    assert "memory.svg" not in plots.pictures(CPU)
