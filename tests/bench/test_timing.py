"""The order of samples, what is inside of them, and which kernels are attention's."""

import gc
import time
from collections import Counter

import pytest
import torch

from stg_engine.bench import timing

CPU = torch.device("cpu")


def test_variants_take_turns():
    called, reported = [], []
    functions = {name: lambda name=name: called.append(name) for name in "abc"}
    samples = timing.interleaved(functions, CPU, 6, warmup_seconds=0, on_progress=reported.append)
    assert called[:3] == ["a", "b", "c"]  # warm-up
    assert called[3:] == reported
    rounds = [called[3 + 3 * i : 6 + 3 * i] for i in range(6)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert {name: len(values) for name, values in samples.items()} == {"a": 6, "b": 6, "c": 6}
    assert Counter(names[0] for names in rounds) == {"a": 2, "b": 2, "c": 2}
    followers = {(names[i], names[i + 1]) for names in rounds for i in range(2)}
    assert len(followers) == 6  # every one follows every other


def test_warm_up_is_by_time():
    calls = Counter()

    def function(name, seconds):
        calls[name] += 1
        time.sleep(seconds)

    functions = {"quick": lambda: function("quick", 0.002), "slow": lambda: function("slow", 0.05)}
    timing.interleaved(functions, CPU, 1, warmup_seconds=0.03)
    assert calls["slow"] == 2
    assert calls["quick"] > 4


def test_the_collector_rests_while_samples_are_taken():
    seen = []
    timing.interleaved({"a": lambda: seen.append(gc.isenabled())}, CPU, 2, warmup_seconds=0)
    assert seen == [True, False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), timing.without_gc():
        1 / 0  # noqa: B018
    assert gc.isenabled()


def test_a_cold_cache_is_made_outside_of_the_sample(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "_flush", lambda device: lambda: calls.append("flush") or time.sleep(0.05))
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = timing.interleaved(functions, CPU, 2, warmup_seconds=0, cold_l2=True)
    assert [x == "flush" for x in calls[2:]] == [True, False] * 4
    assert max(samples["a"] + samples["b"]) < 0.05


def test_seconds_are_those_of_the_call():
    assert 0.02 <= timing.seconds(lambda: time.sleep(0.02), CPU) < 0.2
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.quartiles([3.0, 1.0]) == (1.0, 2.0, 3.0)
    low, middle, high = timing.quartiles([1.0, 2.0, 3.0, 4.0])
    assert (low, middle, high) == (1.25, 2.5, 3.75)


def test_what_only_a_gpu_tells_is_none_on_a_cpu():
    assert timing.peak_bytes(lambda: None, CPU) is None
    assert timing.held_bytes(CPU) is None
    assert timing.launches(lambda: None, CPU) is None


def test_attention_kernels_by_name():
    flash = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>, false>(pytorch_flash::Flash_fwd_params)"
    cudnn = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64"
    others = ["triton_poi_fused__scaled_dot_product_flash_attention_clone_1", "nvjet_tst_128x256", "Memcpy DtoD"]
    found = timing.attention_kernels([cudnn, flash, *others, flash])
    assert found == f"2 x pytorch_flash::flash_fwd_kernel; 1 x {cudnn}"


@pytest.mark.gpu
def test_on_a_gpu():
    device = torch.device("cuda")
    a = torch.ones(1024, 1024, device=device)
    samples = timing.interleaved({"a": lambda: a + 1, "b": lambda: a @ a}, device, 3, warmup_seconds=0.01, cold_l2=True)
    assert all(0 < value < 1 for values in samples.values() for value in values)
    assert timing.peak_bytes(lambda: a + 1, device) == a.nbytes
    assert timing.held_bytes(device) >= a.nbytes
    assert timing.launches(lambda: (a + 1, a - 1), device) == (2, "")
    q = torch.randn(1, 8, 256, 64, device=device, dtype=torch.bfloat16)
    _, attention = timing.launches(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), device)
    assert attention
