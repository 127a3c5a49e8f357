"""The benchmarks' baselines compute what the ops compute, and wrong arguments stop before anything is measured."""

from dataclasses import replace

import pytest
import torch

from benchmarks import ops, readme, record
from benchmarks.shapes import SHAPES

TINY = replace(SHAPES[0], tokens=6, heads=2, head_size=8, latent=4)
CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("op", [case.op for case in ops.cases(TINY, 2, torch.float32, CPU)])
@torch.no_grad()
def test_diffusers_computes_what_the_op_computes(op, rows):
    case = next(case for case in ops.cases(TINY, rows, torch.float32, CPU) if case.op == op)
    calls = ops.implementations(case, compile_too=False)
    torch.testing.assert_close(calls["diffusers"](), calls["eager"]())


def test_only_ltx_video_is_compared_with_diffusers():
    mochi = replace(TINY, model="Mochi, 6 tokens", per_head=True)
    assert not any("diffusers" in ops.implementations(case, False) for case in ops.cases(mochi, 3, torch.float32, CPU))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "HunyuanVideo"], "needs --device cuda"),
        (["--models", "Sora"], "is none of"),
        (["--device", "cuda"], "finds no CUDA device"),
        (["--out", "no/such/folder/ops.csv"], "its folder is not there"),
        (["--rows", "0"], "at least 1"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["ops", "--device", "cpu", *arguments])
    monkeypatch.setattr(ops, "measure", None)
    with pytest.raises(SystemExit, match="2"):
        ops.main()
    assert message in capsys.readouterr().err


def test_one_row_says_that_guidance_is_not_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setattr(ops, "SHAPES", (TINY,))
    monkeypatch.setattr(ops, "measure", lambda case, *rest: [case.op])
    monkeypatch.setattr(record, "append", lambda path, ops: print(*ops))
    monkeypatch.setattr("sys.argv", ["ops", "--device", "cpu", "--rows", "1", "--out", str(tmp_path / "ops.csv")])
    ops.main()
    first, *timed = capsys.readouterr().out.splitlines()
    assert first == "combine_guidance combines two rows or more: not timed with 1"
    assert timed == ["norm_modulate", "residual_gate", "residual_gate_norm_modulate", "qk_norm_rope"]


def test_readme_compares_with_diffusers_of_the_same_commit(monkeypatch):
    texts = {"op": "norm_modulate", "model": "LTX-Video 2B", "dtype": "bfloat16", "device": "CPU", "date": ""}
    versions = {"torch": "", "diffusers": "", "stg_engine": "", "commit": "new", "threads": 1, "rows": 3, "iqr": 0.0}
    speeds = {"gb_per_second": 1.0, "copy_gb_per_second": 2.0, "error": 0.0, "budget": 0.0}
    native = record.OpRow(implementation="native", seconds=0.001, **texts, **versions, **speeds)
    eager = replace(native, implementation="eager", seconds=0.008)
    diffusers = replace(native, implementation="diffusers", seconds=0.004)
    for rows, expected in [
        ([eager, diffusers, native], "diffusers | 4.00 ms | 1.00 ms | 4.0x"),
        ([eager, replace(diffusers, commit="old"), native], "reference | 8.00 ms | 1.00 ms | 8.0x"),
    ]:
        monkeypatch.setattr(record, "read", lambda path, kind, rows=rows: rows)
        assert expected in readme.ops_table()
