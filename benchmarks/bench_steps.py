"""Guided steps of the CPU cases by pytest-benchmark: batched passes, the engine without and with sharing, its default.

`make bench` keeps the JSON in .benchmarks/. A step is only worth its ratio to another of the same run; the parity gate,
baselines and rows are those of `stg-engine bench --case cpu`.
"""

from __future__ import annotations

import pytest
import torch

from stg_engine.bench.case import Case
from stg_engine.bench.cases import find
from stg_engine.bench.ladder import BATCHED, ENGINE, SHARED, UNSHARED
from stg_engine.bench.variants import VARIANTS

ROUNDS, WARMUP = 5, 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=find("cpu"), ids=str)
def prepared(request: pytest.FixtureRequest):
    """A case, its transformer and its inputs, built once for all variants."""
    case: Case = request.param
    return case, case.build(), case.inputs(CPU, torch.float32)


@pytest.mark.parametrize("variant", [BATCHED, UNSHARED, SHARED, ENGINE])
@torch.no_grad()
def test_step(benchmark, prepared, variant):
    case, transformer, inputs = prepared
    chosen = VARIANTS[variant]
    if reason := chosen.why_not(case, CPU):
        pytest.skip(reason)
    benchmark.group = case.name
    with chosen.prepare(case, transformer, inputs) as step:
        benchmark.pedantic(step.guided, rounds=ROUNDS, warmup_rounds=WARMUP)
