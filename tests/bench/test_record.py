"""Rows to CSV and JSON and back, and what a row says of the machine."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from time import sleep

import pytest
import torch

from stg_engine import env
from stg_engine.bench import record
from stg_engine.bench.record import StepRow

VALUES = {"str": "a, \"quoted\" 'name'", "float": 0.125, "int": 3, "bool": True}
ROW = StepRow(**{field.name: VALUES[field.type.split(" |")[0]] for field in fields(StepRow)})
EMPTY = replace(
    ROW, is_exact=False, budget=None, delta_budget=None, peak_bytes=None, launches=None, clock_mhz=None, driver=""
)


def test_csv_gives_back_what_was_written(tmp_path):
    path = tmp_path / "steps.csv"
    assert record.read(path, StepRow) == []
    record.append(path, [ROW])
    record.append(path, [EMPTY, ROW])
    assert record.read(path, StepRow) == [ROW, EMPTY, ROW]
    record.append(path, [])
    assert [path] == list(tmp_path.iterdir())


def test_json_gives_back_what_was_written(tmp_path):
    path = tmp_path / "steps.json"
    record.to_json(path, [ROW, EMPTY])
    assert record.from_json(path, StepRow) == [ROW, EMPTY]
    assert [path] == list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "steps.csv"
    record.append(path, [ROW])
    monkeypatch.setattr(record.csv.DictWriter, "writerows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record.append(path, [EMPTY])
    assert record.read(path, StepRow) == [ROW]
    assert [path] == list(tmp_path.iterdir())


def test_two_that_append_lose_no_rows(tmp_path, monkeypatch):
    path, read = tmp_path / "steps.csv", record.read
    rows = [[replace(ROW, run=f"{part} {i}") for i in range(3)] for part in "ab"]

    def read_slowly(*arguments):
        found = read(*arguments)
        sleep(0.05)
        return found

    monkeypatch.setattr(record, "read", read_slowly)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: [record.append(path, [row]) for row in part], rows))
    assert sorted(row.run for row in read(path, StepRow)) == sorted(row.run for part in rows for row in part)


def test_files_of_something_else_are_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("case,colour\n1,2\n")
    with pytest.raises(
        ValueError,
        match=r"x\.csv holds no StepRows of this version: missing fields: 'run', .* more; unknown fields: 'colour'",
    ):
        record.append(path, [ROW])
    assert path.read_text() == "case,colour\n1,2\n"
    for text, message in (
        ("nonsense", "cannot be read"),
        ("{}", "list of objects"),
        ('[{"run": 1}]', "holds no StepR"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            record.from_json(path, StepRow)
    with pytest.raises(ValueError, match="nowhere"):
        record.from_json(tmp_path / "nowhere.json", StepRow)


def test_the_environment_fills_the_machine_fields_of_a_row():
    found = record.environment(torch.device("cpu"))
    names = [field.name for field in fields(StepRow)]
    assert list(found) == names[names.index("dtype") + 1 :]
    assert (found["clock_mhz"], found["driver"], found["cudnn"]) == (None, "", "")
    assert found["device"].endswith(record.CORES)
    assert "flash_attention" in found["sdpa"]
    assert all(isinstance(value, str) for name, value in found.items() if name not in ("threads", "clock_mhz"))
    json.dumps(found)


def test_the_commit_is_that_of_this_package_alone(tmp_path, monkeypatch):
    git = {"cwd": tmp_path, "check": True, "capture_output": True}
    name = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "init", "-q"], **git)
    package = tmp_path / "stg_engine" / "bench" / "record.py"
    package.parent.mkdir(parents=True)
    package.write_text("1")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(record, "__file__", str(package))
    monkeypatch.setattr(record, "RESULTS", results)
    assert record.commit() == "unknown"  # a repository that does not hold the package
    (results / "steps.csv").write_text("1")
    subprocess.run(["git", "add", "."], **git)
    subprocess.run(["git", *name, "commit", "-qm", "one"], **git)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git, text=True).stdout.strip()
    assert record.commit() == head
    (results / "steps.csv").write_text("2")
    assert record.commit() == head
    package.write_text("2")
    assert record.commit() == f"{head}-dirty"


@pytest.mark.parametrize(("answer", "clock"), [("1980 MHz\n", 1980), ("[N/A]\n", None), ("", None)])
def test_the_clock_is_asked_of_the_device_in_use(monkeypatch, answer, clock):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=answer)

    properties = type("Properties", (), {"uuid": "ab-12"})
    monkeypatch.setattr(env.shutil, "which", lambda name: Path(name))
    monkeypatch.setattr(env.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert env.clock_mhz(torch.device("cuda", 1)) == clock
    assert "--id=GPU-ab-12" in asked[0]
    assert "--query-gpu=clocks.sm" in asked[0]
    assert env.clock_mhz("cpu") is None
