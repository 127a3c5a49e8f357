"""Ratios are of rows of one run, and the newest run counts."""

from dataclasses import replace

import pytest
from bench.made_up import ladder_rows, step_row

from stg_engine.bench.ladder import ORDER, Ladder, ladders


def test_cases_devices_and_dtypes_are_apart():
    rows = [step_row("engine", **change) for change in ({}, {"dtype": "float32"}, {"device": "CPU"}, {"case": "mochi"})]
    assert [ladder.rows for ladder in ladders([*rows, *rows])] == [(row, row) for row in rows]


def test_variants_stand_in_order():
    rows = ladder_rows()
    assert tuple(Ladder(tuple(reversed(rows))).newest) == ORDER
    assert list(Ladder((step_row("engine"), replace(rows[0], variant="new"), rows[0])).newest) == [
        "cfg",
        "engine",
        "new",
    ]


def test_a_ratio_is_of_one_run_and_the_newest():
    old = [step_row("batched-passes", seconds=3.0), step_row("engine", seconds=2.0)]
    other = [step_row("engine", seconds=1.0, run="two")]
    assert Ladder((*old, *other)).ratio("batched-passes", "engine") == 1.5
    assert Ladder(tuple(other)).ratio("batched-passes", "engine") is None
    new = [step_row("batched-passes", seconds=4.0, run="three"), step_row("engine", seconds=1.0, run="three")]
    assert Ladder((*old, *other, *new)).ratio("batched-passes", "engine") == 4.0
    assert Ladder((*old, *other)).newest["engine"].seconds == 1.0


def test_sharing_efficiency_is_the_ratio_over_the_block_rows():
    unshared, shared = step_row("engine-unshared", seconds=83.0), step_row("engine-shared", seconds=80.0)
    assert Ladder((unshared, shared)).sharing_efficiency == pytest.approx(64 / 80)
    assert Ladder((unshared, replace(shared, run="two"))).sharing_efficiency is None


def test_the_bound_is_over_plain_passes_which_compute_what_they_skip():
    cfg, batched, unshared, shared = map(step_row, ("cfg", "batched-passes", "engine-unshared", "engine-shared"))
    assert Ladder((cfg, batched, unshared, shared)).bound == 84 / 64
    assert Ladder((cfg, unshared, shared)).bound is None
    assert Ladder((batched, unshared)).bound is None


def test_the_best_is_exact_and_measured_beside_batched_passes():
    ladder = Ladder(tuple(ladder_rows()))
    assert ladder.best.variant == "engine-graph"
    alone = step_row("engine-serial", seconds=0.01, run="two")
    assert Ladder((*ladder.rows, alone)).best.variant == "engine-graph"
    assert Ladder((alone,)).best is None


def test_compiled_passes_are_the_faster_of_both():
    # Not engine-graph: compiled passes have no graph.
    assert Ladder(tuple(ladder_rows())).gain_over_compiled == pytest.approx(0.212 / 0.160)
    assert Ladder((step_row("engine"), step_row("batched-passes"))).gain_over_compiled is None
    beside_one = [step_row("compiled-passes", run="two"), step_row("engine-serial", seconds=0.01, run="two")]
    assert Ladder((*ladder_rows(), *beside_one)).gain_over_compiled == pytest.approx(0.212 / 0.160)


def test_every_variant_has_its_place():
    variants = pytest.importorskip("stg_engine.bench.variants").VARIANTS
    assert tuple(variants) == ORDER
