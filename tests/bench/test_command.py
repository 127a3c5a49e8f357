"""`stg-engine bench` end to end on a case that takes milliseconds, and its table."""

import json
import os
from dataclasses import replace

import pytest
import torch
from bench.made_up import ladder_rows
from bench.test_record import ROW
from bench.tiny_case import install, tiny_case

from stg_engine import cli, guidance
from stg_engine.bench import command, record, table, timing, variants
from stg_engine.bench import run as run_module
from stg_engine.bench.record import StepRow

FEW = "cfg,batched-passes,engine-unshared,engine-shared"


@pytest.fixture
def case(monkeypatch):
    return install(monkeypatch, tiny_case("tinier"))


def run(*options: str) -> int:
    return cli.main(["bench", "--device", "cpu", "--repeats", "2", *options])


def test_table_files_and_comparison(case, tmp_path, capsys):
    rows, sheet, plot = tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "a.png"
    outputs = ["--json", str(rows), "--csv", str(sheet)]
    assert run("--baselines", FEW, *outputs, "--plot", str(plot)) == 0
    out, err = capsys.readouterr()
    assert "tiny: LTX-Video of 4 blocks, 24 tokens, float32, median of 2" in out
    assert "ceilings: 100 GFLOP/s in GEMMs, 50 GFLOP/s in attention, 10 GB/s" in out
    lines = [line for line in out.splitlines() if line.startswith(tuple(FEW.split(","))) and "  " in line]
    assert [line.split()[0] for line in lines] == 4 * FEW.split(",")  # of each case: time, and what else is known
    assert f"8 rows of tiny, tinier are in {sheet} and {rows} and {plot}" in out
    assert "progress" not in err
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = record.from_json(rows, StepRow)
    assert [(row.case, row.variant) for row in written] == [(c, v) for c in ("tiny", "tinier") for v in FEW.split(",")]
    assert len({row.run for row in written}) == 1
    assert run("--case", "tiny", "--baselines", "engine-shared", "--compare", str(rows), "--csv", str(sheet)) == 0
    out = capsys.readouterr().out
    assert f"against {rows}:" in out
    assert len(record.read(sheet, StepRow)) == 9
    assert len({row.run for row in record.read(sheet, StepRow)}) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json", "a.png"]


def test_a_plot_alone_is_said_to_be_written(case, tmp_path, capsys):
    plot = tmp_path / "a.png"
    assert run("--case", "tiny", "--baselines", "batched-passes", "--plot", str(plot)) == 0
    assert capsys.readouterr().out.endswith(f"1 rows of tiny are in {plot}\n")
    assert plot.exists()


def test_defaults_of_a_cpu(case, monkeypatch, capsys):
    chosen = []

    def measure(case, ways, *_):
        chosen.append((case.name, [way.name for way in ways]))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_measure", measure)
    assert cli.main(["bench", "--device", "cpu"]) == 130
    assert chosen[0][0] == "tiny"
    assert set(variants.VARIANTS) - set(chosen[0][1]) == set(variants.SLOW_TO_START)
    out, err = capsys.readouterr()
    assert f"without {', '.join(variants.SLOW_TO_START)}" in out
    assert err == "stg-engine: error: interrupted; 0 rows measured, nothing was written\n"


def test_a_red_gate_prints_no_ratio_and_ends_with_1(case, monkeypatch, tmp_path, capsys):
    combine = guidance.combine
    monkeypatch.setattr(guidance, "combine", lambda *a, **k: 1.01 * combine(*a, **k))
    sheet = tmp_path / "a.csv"
    assert run("--case", "tiny", "--baselines", "batched-passes,engine-shared", "--csv", str(sheet)) == 1
    out, err = capsys.readouterr()
    assert [row.variant for row in record.read(sheet, StepRow)] == ["batched-passes"]
    line = next(line for line in out.splitlines() if "engine-shared:" in line)
    assert line.startswith("- engine-shared: PARITY GATE RED: error of output 0 1.0")
    assert not any(line.startswith("engine-shared ") for line in out.splitlines())
    assert err.startswith("stg-engine: error: GateFailure: engine-shared of tiny: PARITY GATE RED")
    assert err.count("\n") == 1


def test_an_interrupt_leaves_whole_files(case, monkeypatch, tmp_path, capsys):
    interleaved, calls = timing.interleaved, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return interleaved(*arguments, **options)

    monkeypatch.setattr(timing, "interleaved", interrupted)
    sheet, rows = tmp_path / "a.csv", tmp_path / "a.json"
    record.append(sheet, [ROW])
    assert run("--baselines", "batched-passes", "--csv", str(sheet), "--json", str(rows)) == 130
    assert capsys.readouterr().err == (f"stg-engine: error: interrupted; 1 rows of tiny are in {sheet} and {rows}\n")
    assert [row.case for row in record.read(sheet, StepRow)] == [ROW.case, "tiny"]
    assert [line["case"] for line in json.loads(rows.read_text())] == ["tiny"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_plot_is_named_if_this_run_drew_it(case, monkeypatch, tmp_path, capsys):
    plot = tmp_path / "a.svg"
    options = ("--case", "tiny", "--baselines", "batched-passes", "--plot", str(plot))
    assert run(*options) == 0
    assert capsys.readouterr().out.endswith(f"1 rows of tiny are in {plot}\n")
    monkeypatch.setattr(command._Files, "draw", lambda files: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(*options) == 130
    assert capsys.readouterr().err.endswith("interrupted; 1 rows measured, nothing was written\n")


def test_a_case_without_memory_is_said_and_others_go_on(case, monkeypatch, capsys):
    measure = command._measure

    def scarce(case, *arguments):
        if case.name == "tiny":
            raise torch.OutOfMemoryError
        return measure(case, *arguments)

    monkeypatch.setattr(command, "_measure", scarce)
    assert run("--baselines", "batched-passes") == 1
    out, err = capsys.readouterr()
    assert "tiny: no memory for its weights and exact step" in out
    assert "tinier: LTX-Video" in out
    assert "tiny: no memory" in err


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        ("--case tiny,huge", ["case='huge'", "tinier"]),
        ("--baselines engine,magic", ["baselines='magic'", "engine-graph"]),
        ("--repeats 0", ["repeats=0", "at least 1"]),
        ("--device toaster", ["device='toaster'"]),
        ("--dtype int8", ["--dtype", "bfloat16"]),
        ("--json no/such/a.json", ["json='no/such/a.json'", "folder that exists"]),
        ("--csv .", ["csv='.'", "folder that exists"]),
        ("--csv {other}", ["holds no StepRows", "more; unknown fields: 'a', 'b'"]),
        ("--json a.csv --csv a.csv", ["json, csv, plot: must be different files"]),
        ("--plot a.gif", ["plot='a.gif'", ".png"]),
        ("--compare nowhere.json", ["nowhere.json", "cannot be read"]),
        ("--compare nowhere.csv", ["nowhere.csv", "no such file"]),
        ("--compare {other}", ["holds no StepRows"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_end_before_anything_is_measured(case, monkeypatch, tmp_path, capsys, options, needles):
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("a case was measured"))
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert run(*options.format(other=other).split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for needle in needles:
        assert needle in err
    assert list(tmp_path.iterdir()) == [other]


def test_a_pinned_attention_and_a_missing_matplotlib_are_said(case, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("STG_ATTENTION", "torch")
    assert run() == 2
    assert "STG_ATTENTION=torch pins" in capsys.readouterr().err
    monkeypatch.delenv("STG_ATTENTION")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("--plot", str(tmp_path / "a.png")) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_list(case, capsys):
    assert cli.main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    assert "tinier  cpu    LTX-Video of 4 blocks, 24 tokens" in out
    assert all(name in out for name in variants.VARIANTS)


def row(variant, seconds, **changes):
    changes = {"low": 0.95 * seconds, "high": 1.05 * seconds, "ideal_seconds": seconds, "block_rows": 9, **changes}
    return replace(ROW, variant=variant, seconds=seconds, **changes)


def cells(text, variant):
    return next(line for line in text.splitlines() if line.startswith(f"{variant} ")).split()


def test_ratios_of_a_table():
    rows = [
        row("cfg", 0.2),
        row("batched-passes", 0.3),
        row("engine-unshared", 0.3, bound=1.0),
        row("engine-shared", 0.24, bound=1.25, ideal_seconds=0.12),
        row("engine", 0.2, bound=1.25, budget=0.5, error=0.25),
        row("float8-engine", 0.1, is_exact=False, budget=None),
    ]
    text = table.case_table(rows, {"engine-graph": "needs CUDA"})
    exact, lossy = text.split("lossy variant")
    assert cells(exact, "engine-shared")[1:] == [
        *["240", "(228", "to", "252)", "1.250", "1.250", "engine-unshared", "1.250", "1.000", "0.50"],
    ]
    assert cells(exact.split("first call")[1], "engine-shared")[1:] == [
        *["0.12", "s", "0", "MiB", "3", "1.2e-01", "/", "1.2e-01", "1.2e-01", "/", "1.2e-01"],
    ]
    assert cells(exact, "engine")[5:10] == ["1.500", "1.200", "engine-shared", "1.250", "1.200"]
    assert "2.5e-01 / 5.0e-01" in exact
    assert cells(exact, "cfg")[5:9] == ["1.500", "-", "-", "-"]
    assert cells(lossy, "float8-engine")[5] == "3.000"
    assert "float8" not in exact
    assert "float8-engine: a, " in lossy  # what ran
    assert "- engine-graph: needs CUDA" in text
    assert "More than 15% from the cost model, which counts no launches: engine-shared 2.00x its time." in text


def test_a_table_fits_and_has_no_empty_columns():
    rows = ladder_rows()
    text = table.case_table(rows, {})
    assert "first call  memory    launches  error / budget" in text
    assert max(map(len, text.splitlines())) <= table.WIDTH
    assert max(map(len, table.LEGEND.splitlines())) <= table.WIDTH
    of_a_cpu = table.case_table([replace(row, peak_bytes=None, launches=None) for row in rows if row.is_exact], {})
    heads = next(line for line in of_a_cpu.splitlines() if "first call" in line)
    assert heads.split() == ["variant", "first", "call", "error", "/", "budget", "c", "-", "p", "/", "budget"]


def test_a_comparison_of_too_few_samples_has_no_verdict():
    few, enough = row("engine", 0.2, samples=3), row("engine", 0.1, samples=20)
    assert table.comparison([enough], [few]).splitlines()[1].endswith("fewer than 4 samples: no verdict")
    assert table.comparison([enough], [enough]).splitlines()[1].endswith("within the spread")


def test_a_comparison_says_what_is_within_the_spread_and_what_differs():
    old = [row("engine", 0.2), row("cfg", 0.2), row("batched-passes", 1.0), row("only-old", 1.0)]
    old = [replace(each, samples=20) for each in old]
    new = [row("engine", 0.1), row("cfg", 0.205), row("batched-passes", 2.0, device="other", dtype="bfloat16")]
    new = [replace(each, samples=20) for each in new]
    lines = table.comparison(new, old).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["faster", "spread", "verdict"]
    assert "0.500" in lines[1]
    assert f"{0.95 / 1.05 / 2:.3f} to {1.05 / 0.95 / 2:.3f}" in lines[1]
    assert lines[4:] == [f"device differs: {ROW.device} was, other is", f"dtype differs: {ROW.dtype} was, bfloat16 is"]
    assert table.comparison(new, []) == "No case and variant is in both."


def test_names_are_separated_by_commas_and_the_environment_is_left_alone(case):
    before = dict(os.environ)
    assert command._names("a, b") == ("a", "b")
    assert run("--case", "tiny", "--baselines", "engine-kernels") == 0
    assert dict(os.environ) == before


def test_the_autocast_of_mochi_is_no_warning_to_the_user(recwarn):
    with run_module._surroundings([]), torch.autocast("cpu", torch.float32):
        pass
    assert not list(recwarn)
