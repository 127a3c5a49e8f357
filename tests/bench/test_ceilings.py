"""Ceilings: what is divided by what, which attention counts, how calls are timed; on a GPU, that the clock is right."""

import time
from dataclasses import replace

import pytest
import torch
from stg_kernels.attention import dispatch
from stg_kernels.attention.backends import LIBRARIES

from stg_engine.bench import ceilings
from stg_engine.bench.cost import Ceilings

CPU = torch.device("cpu")
SDPA = LIBRARIES[0]
SHAPE = {"heads": 2, "head_size": 8, "queries": 16}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(ceilings.PRODUCT, "cpu", 32)
    monkeypatch.setitem(ceilings.COPIED_BYTES, "cpu", 4096)
    monkeypatch.setitem(ceilings.ATTENTION_FLOPS, "cpu", 1e5)
    for module in (ceilings, dispatch):  # Triton's interpreter, which runs in tests, is slow
        monkeypatch.setattr(module, "backends", lambda: (SDPA,))


@pytest.fixture
def timed(monkeypatch, small):
    """The calls that were timed, and their results; each takes half a second."""
    calls = []

    def seconds(call, device):
        calls.append((call, call()))
        return 0.5

    monkeypatch.setattr(ceilings, "seconds", seconds)
    return calls


def test_work_over_seconds(timed):
    measured = ceilings.measure(CPU, torch.float32, **SHAPE, keys=24)
    rows = 5  # 1e5 / (4 * 2 * 16 * 24 * 8), rounded up
    assert measured == Ceilings(2 * 32**3 / 0.5, rows * 4 * 2 * 16 * 24 * 8 / 0.5, 4096 / 0.5)
    shapes = {tuple(result.shape): result.dtype for _, result in timed}
    assert shapes == {(32, 32): torch.float32, (rows, 16, 2, 8): torch.float32, (2048,): torch.uint8}


def test_keys_are_as_many_as_queries(timed):
    rows = 7  # 1e5 / (4 * 2 * 16 * 16 * 8), rounded up
    assert ceilings.measure(CPU, torch.bfloat16, **SHAPE).attention == rows * 4 * 2 * 16 * 16 * 8 / 0.5
    assert {result.dtype for _, result in timed} == {torch.bfloat16, torch.uint8}


def test_the_fastest_exact_attention_counts(timed, monkeypatch):
    """Neither a faster one that is wrong nor a slower one."""

    def wait(part):
        time.sleep(0.01)
        return SDPA.run(part)

    wrong = replace(SDPA, name="wrong", run=lambda part: torch.zeros_like(part.q))
    slow, fast = replace(SDPA, name="slow", run=wait), replace(SDPA, name="fast")
    for module in (ceilings, dispatch):
        monkeypatch.setattr(module, "backends", lambda: (slow, wrong, fast))
    ceilings.measure(CPU, torch.float32, **SHAPE)
    attention = [call.func for call, result in timed if result.ndim == 4]
    assert attention == [fast.run]
    for module in (ceilings, dispatch):
        monkeypatch.setattr(module, "backends", lambda: (wrong,))
    with pytest.raises(RuntimeError, match="no attention backend computes"):
        ceilings.measure(CPU, torch.float32, **SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_measurement(small, dtype, monkeypatch):
    monkeypatch.setattr(ceilings, "SECONDS", 0.01)
    monkeypatch.setitem(ceilings.WARM_UP, "cpu", 0.0)
    measured = ceilings.measure(CPU, dtype, **SHAPE)
    assert 0 < max(measured.matmul, measured.attention) < 1e15
    assert 0 < measured.copy < 1e15


def test_the_median_of_enough_calls(monkeypatch):
    """A clock that advances in calls alone: 1 s each, and one of 100 s."""
    now, durations = [0.0], []
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ceilings, "WARM_UP", {"cpu": 3.0})
    monkeypatch.setattr(ceilings, "SECONDS", 20.0)

    def call():
        durations.append(100.0 if len(durations) == 8 else 1.0)
        now[0] += durations[-1]

    assert ceilings.seconds(call, CPU) == 1.0
    assert len(durations) == 1 + 3 + 20
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    durations.clear()
    ceilings.seconds(call, CPU)
    assert len(durations) == 1 + 3 + ceilings.REPEATS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": torch.device("meta")}, "device='meta' is not allowed; choose one of 'cuda', 'cpu'"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not allowed"),
        ({"heads": 0}, "heads=0 is not allowed"),
        ({"keys": 0}, "keys=0 is not allowed"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        ceilings.measure(**{"device": CPU, "dtype": torch.float32, **SHAPE, **arguments})


@pytest.mark.gpu
def test_on_a_gpu():
    """Work that is doubled takes twice the time, within what clocks vary; a large product is faster than a copy's."""
    device = torch.device("cuda")
    measured = ceilings.measure(device, torch.bfloat16, 32, 64, 4096)
    assert measured.matmul > 1e12
    assert measured.attention < 1.1 * measured.matmul
    assert measured.copy > 1e11
    once, twice = (ceilings.seconds(ceilings.copy(n << 29, device), device) for n in (1, 2))
    assert 1.5 < twice / once < 2.5
