"""benchmarks.attention on a CPU: rows and their fields, the parity gate, options."""

from dataclasses import replace

import pytest
from stg_kernels.attention import dispatch
from stg_kernels.attention.backends import LIBRARIES, TORCH

from benchmarks import attention, readme, record

SDPA = LIBRARIES[0]
TINY = ["--device", "cpu", "--tokens", "8"]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs with the given backends and a clock that says 0.5 s; the rows that are then in the CSV file."""
    monkeypatch.setattr(attention, "timed", lambda *_: (0.5, 0.1))
    monkeypatch.delenv("STG_ATTENTION", raising=False)
    before = dict(dispatch._ran)

    def run(*options, backends=(SDPA, TORCH)):
        for module in (attention, dispatch):
            monkeypatch.setattr(module, "backends", lambda: backends)
        out = tmp_path / "attention.csv"
        attention.main([*TINY, "--out", str(out), *options])
        return record.read(out, record.AttentionRow)

    yield run
    dispatch.choices.forget()
    dispatch._ran.clear()
    dispatch._ran.update(before)


def test_rows(measured):
    rows = measured("--models", "LTX-Video 2B", "--rows", "3", "--cases", "cross, lengths")
    assert [(row.backend, row.case, row.model) for row in rows] == [
        (name, "cross, lengths", "LTX-Video 2B, 8 tokens") for name in ("sdpa", "dispatch: sdpa")
    ]
    for row in rows:
        assert (row.rows, row.queries, row.keys, row.heads, row.head_size, row.dtype) == (3, 8, 256, 32, 64, "float32")
        assert row.tflops * 1e12 == pytest.approx(4 * 8 * (3 + 77 + 77) * 32 * 64 / 0.5, rel=1e-5)
        assert row.matmul_tflops * 1e12 == pytest.approx(2 * 1024**3 / 0.5, rel=1e-5)
        assert row.error <= row.budget
        assert not record.is_cuda(row)


def test_own_keys_are_computed_by_torch_and_other_rows_are_not(measured):
    rows = measured("--models", "CogVideoX-2B", "--rows", "2", "--cases", "own keys")
    assert [(row.case, row.backend, row.rows, row.queries, row.keys) for row in rows] == [
        ("own keys, dense part", "sdpa", 1, 234, 234),
        ("own keys, own keys part", "torch", 1, 8, 226),
        ("own keys, dense part", "sdpa", 1, 226, 234),
        ("own keys", "dispatch: sdpa + torch", 2, 234, 234),
    ]
    pairs = [234 * 234, 8 * (226 + 1), 226 * 234]
    assert [row.tflops * 0.5e12 / (4 * 30 * 64) for row in rows] == pytest.approx(
        [*pairs, sum(pairs)], rel=1e-5
    )  # six digits in the file


def test_shared_keys_beside_their_copies(measured, capsys):
    rows = measured("--models", "LTX-Video 2B", "--rows", "1", "3", "--cases", "shared")
    assert [row.case for row in rows] == ["shared keys"] * 2 + ["shared keys, materialised"] * 2
    assert "best / best materialised" in capsys.readouterr().out


def test_a_wrong_backend_gets_no_row(measured, capsys):
    wrong = replace(SDPA, name="wrong", run=lambda part: SDPA.run(part) + 1e-3)
    rows = measured("--models", "LTX-Video 2B", "--rows", "1", "--cases", "cross", backends=(SDPA, wrong, TORCH))
    assert {row.backend for row in rows} == {"sdpa", "dispatch: sdpa"}
    assert "PARITY GATE RED" in capsys.readouterr().out


def test_a_wrong_dispatch_gets_no_row(measured, capsys):
    wrong = replace(SDPA, run=lambda part: SDPA.run(part) * float("nan"))
    options = ["--models", "LTX-Video 2B", "--rows", "1", "--cases", "cross"]
    assert measured(*options, backends=(wrong,)) == []
    assert capsys.readouterr().out.count("PARITY GATE RED") == 4


def test_a_lossy_backend_runs_only_if_asked_and_is_marked(measured):
    lossy = replace(SDPA, name="lossy", run=lambda part: SDPA.run(part) + 1e-3, is_exact=False)
    options = ["--models", "LTX-Video 2B", "--rows", "1", "--cases", "cross, l"]
    assert {row.backend for row in measured(*options, backends=(SDPA, lossy))} == {"sdpa", "dispatch: sdpa"}
    assert "lossy (lossy)" in {row.backend for row in measured(*options, "--lossy", backends=(SDPA, lossy))}


def test_a_backend_that_cannot_run_says_why(measured, capsys):
    def fail(part):
        raise NotImplementedError("not here\nsecond line")

    refuses = replace(SDPA, name="refuses", why_not=lambda part: "it needs a newer device")
    options = ["--models", "LTX-Video 2B", "--rows", "1", "--cases", "cross, l"]
    rows = measured(*options, backends=(SDPA, refuses, replace(SDPA, name="fails", run=fail)))
    assert {row.backend for row in rows} == {"sdpa", "dispatch: sdpa"}
    out = capsys.readouterr().out
    assert "cannot run: it needs a newer device\n" in out
    assert "cannot run: NotImplementedError: not here\n" in out


def test_the_readme_shows_cuda_rows_alone(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    rows = measured("--models", "LTX-Video 2B", "--rows", "3", "--cases", "self")
    assert readme.attention_table() == "No CUDA device has been measured yet."
    sdpa, ours = (
        replace(row, device="NVIDIA H200", commit="c", seconds=1e-3 * i) for i, row in zip((6, 4), rows, strict=True)
    )
    record.append(tmp_path / "attention.csv", [replace(sdpa, backend="sdpa (flash)"), ours])
    (line,) = readme.attention_table().splitlines()[2:]
    expected = "self | LTX-Video 2B, 8 tokens | float32 | 6.00 ms | 4.00 ms | 1.50x | sdpa |"
    assert line.startswith(f"| {expected}")
    assert line.endswith("| NVIDIA H200, commit c |")


@pytest.mark.parametrize(
    "options",
    [
        ["--models", "LTX-3"],
        ["--cases", "dense"],
        ["--cases", "own keys", "--models", "Wan"],
        ["--out", "missing/attention.csv"],
        ["--rows", "0"],
        ["--tokens", "0"],
        ["--device", "cuda"],
    ],
    ids=" ".join,
)
def test_wrong_options(options, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("STG_ATTENTION", raising=False)
    with pytest.raises(SystemExit) as stopped:
        attention.main(options)
    assert stopped.value.code == 2
    assert f"error: {options[0]} " in capsys.readouterr().err


def test_a_pinned_backend_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("STG_ATTENTION", "sdpa")
    with pytest.raises(SystemExit):
        attention.main(TINY)
    assert "STG_ATTENTION=sdpa" in capsys.readouterr().err
