"""`python -m benchmarks.gpu`: order, restarts, the end of the time, and rows that are kept once."""

import sys

import pytest
from bench.made_up import step_row

from benchmarks import gpu, plots, record
from stg_engine.bench.ladder import BATCHED, ORDER, SHARED, UNSHARED


@pytest.fixture
def commands(monkeypatch):
    """Steps in place of the real ones: {name: a line of Python}."""
    lines = {}
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "steps", lambda out, repeats: {name: ["-c", line] for name, line in lines.items()})
    return lines


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, arguments)])
    return gpu.main()


def test_short_steps_come_first(tmp_path):
    names = list(gpu.steps(tmp_path))
    assert names[:2] == ["tests", "ops-ltx-video-2b"]
    assert "attention-mochi" in names
    cases = [name for name in names if name.startswith("case-")]
    assert names[-len(cases) :] == cases
    assert not [name for name in cases if name.endswith("-cpu")]
    assert cases.index("case-wan-2.1-14b-small") < cases.index("case-ltx-video-2b.sharing")
    assert (
        cases.index("case-ltx-video-2b.others") < cases.index("case-mochi.sharing") < cases.index("case-ltx-2.sharing")
    )
    assert cases[-1].startswith("case-wan")


def test_every_part_of_a_case_has_the_baseline_of_its_ratios():
    parts = [names.split(",") for names in gpu.BASELINES.values()]
    assert all(BATCHED in part for part in parts)
    assert {name for part in parts for name in part} == set(ORDER)
    assert {UNSHARED, SHARED} <= set(parts[0])


def test_a_done_step_is_not_run_again(commands, tmp_path, monkeypatch, capsys):
    commands |= {"tests": "print('once')", "case-a": "raise SystemExit(2)"}
    assert call(monkeypatch, "--out", tmp_path) == 1
    assert capsys.readouterr().out.endswith("failed: case-a\n")
    commands["case-a"] = "print('mended')"
    assert call(monkeypatch, "--out", tmp_path) == 0
    assert (tmp_path / "tests.log").read_text() == "once\n"
    assert (tmp_path / "case-a.log").read_text() == "mended\n"


def test_the_time_ends_a_step_and_those_behind_it(commands, tmp_path, monkeypatch, capsys):
    commands |= {"tests": "import time; time.sleep(60)", "case-a": "print()"}
    assert call(monkeypatch, "--out", tmp_path, "--minutes", 0.5 / 60) == 1
    assert capsys.readouterr().out.endswith("left: tests case-a\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tests.log"]


def test_only_the_steps_that_are_named(commands, tmp_path, monkeypatch, capsys):
    commands |= {"tests": "1", "case-a": "1", "case-b": "1"}
    assert call(monkeypatch, "--out", tmp_path, "--list", "case") == 0
    assert capsys.readouterr().out.split() == ["case-a", "case-b"]
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "--out", tmp_path, "ops")
    assert "'ops' begins none of tests, case-a, case-b" in capsys.readouterr().err


def test_rows_are_kept_once(tmp_path, monkeypatch):
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    out.mkdir()
    monkeypatch.setattr(record, "RESULTS", results)
    old, new = step_row("cfg"), step_row("engine")
    record.append(results / "steps.csv", [old])
    record.append(out / "steps.csv", [old, new])
    for _ in range(2):
        assert call(monkeypatch, "--keep", out) == 0
    assert [row.variant for row in record.read(results / "steps.csv", record.StepRow)] == ["cfg", "engine"]


def test_without_a_cuda_device_nothing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("a step was run"))
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert all("cuda" in arguments for name, arguments in gpu.steps(tmp_path).items() if name != "tests")


def test_a_folder_without_rows_is_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--keep", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "holds none of ops.csv" in capsys.readouterr().err


def test_no_picture_is_taken_away_for_a_file_that_is_missing(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "waterfall.svg"
    picture.write_text("")
    monkeypatch.setattr(sys, "argv", ["plots", "--csv", str(tmp_path / "no.csv"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        plots.main()
    assert "there is no file" in capsys.readouterr().err
    assert picture.exists()
