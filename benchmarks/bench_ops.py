"""Every op of stg_kernels on this CPU against diffusers and eager torch in one run: what kernels="auto" relies on.

`make bench` prints the table; skipped without its memory settings, which are those of `benchmarks.ops`. That has the
parity gate, the copy ceiling and the CSV. pytest-benchmark keeps its own JSON (`ARGS=--benchmark-json=...`).
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import stg_kernels
import torch

from benchmarks.ops import CPU_TOKENS, KEEP_MEMORY, cases, implementations
from benchmarks.shapes import SHAPES

SHAPE = replace(SHAPES[0], tokens=CPU_TOKENS)  # LTX-Video 2B's width
SETTINGS = " ".join(f"{name}={value}" for name, value in KEEP_MEMORY.items())


@pytest.mark.skipif("MALLOC_TRIM_THRESHOLD_" not in os.environ, reason=f"run `make bench`, or set {SETTINGS}")
@pytest.mark.skipif("cpu" not in stg_kernels.native_devices(), reason="stg_kernels._C was not built")
@pytest.mark.parametrize("implementation", ["native", "diffusers", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("op", [case.op for case in cases(replace(SHAPE, tokens=1), 2, torch.float32, "cpu")])
@torch.no_grad()
def test_op(benchmark, op, rows, dtype, implementation):
    case = next((case for case in cases(SHAPE, rows, dtype, torch.device("cpu")) if case.op == op), None)
    if case is None:
        pytest.skip("guidance combines two rows or more")
    benchmark.group = f"{op}, {rows} x {SHAPE.model.split(',')[0]}, {str(dtype).removeprefix('torch.')}"
    benchmark(implementations(case, compile_too=False)[implementation])
