"""What sharing rows is worth: three plain passes against the engine, the same modules, one run. `make bench`.

28 blocks of 8 heads x 64 on 480 tokens, LTX-Video 2B's plan (layer 19). The passes run as one batch of three rows or
one after another; each engine step is timed right after a plain one, so that a machine that slows down slows both. A
row is recorded only if the parity gate holds: the engine's error against float64 is at most twice the plain passes'.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from functools import partial

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor

from benchmarks import record
from stg_engine import Denoiser, STGConfig
from stg_engine.reference import three_passes

BLOCKS, HEADS, HEAD_SIZE, FRAMES, HEIGHT, WIDTH, TEXT = 28, 8, 64, 3, 10, 16, 64
CONFIG = STGConfig.preset("ltx-video-2b")
ROUNDS = 20


def model_and_inputs() -> tuple[LTXVideoTransformer3DModel, tuple]:
    """A random transformer, and (shared, cond, uncond) for one video."""
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_SIZE,
        cross_attention_dim=HEADS * HEAD_SIZE,
        num_layers=BLOCKS,
        caption_channels=128,
    )
    size = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "rope_interpolation_scale": (8 / 25, 32, 32)}
    shared = {"hidden_states": torch.randn(1, FRAMES * HEIGHT * WIDTH, 16), "timestep": torch.tensor([700.0]), **size}
    cond, uncond = (
        {"encoder_hidden_states": torch.randn(1, TEXT, 128), "encoder_attention_mask": torch.ones(1, TEXT)}
        for _ in range(2)
    )
    return model.eval(), (shared, cond, uncond)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def quartile_range(samples: list[float]) -> float:
    low, _, high = statistics.quantiles(samples, n=4)
    return high - low


@pytest.mark.parametrize("kernels", ["off", "auto"])
@pytest.mark.parametrize("plain", ["one batch", "one by one"])
@torch.no_grad()
def test_sharing(benchmark, plain, kernels):
    model, inputs = model_and_inputs()
    double = [{k: v.double() if isinstance(v, Tensor) else v for k, v in i.items()} for i in inputs]
    exact = three_passes(copy.deepcopy(model).double(), CONFIG, *double, 3.0)
    twin, _ = model_and_inputs()  # a hooked model of its own on the same weights: both stay warm
    twin.load_state_dict(model.state_dict(), assign=True)
    passes = partial(three_passes, model, CONFIG, *inputs, 3.0, one_batch=plain == "one batch")
    budget = relative_error(passes(), exact)
    plain_seconds, engine_seconds = [], []
    with Denoiser(twin, CONFIG, kernels=kernels) as denoiser:
        step = partial(denoiser, *inputs, guidance_scale=3.0)
        error = relative_error(step(), exact)
        assert error <= 2 * budget, f"parity gate: error {error:.2e}, the plain passes' {budget:.2e}; no time is stated"
        plan, used = denoiser.plans(), denoiser.fusion.used
        if kernels == "auto" and not denoiser.fusion.is_on:
            pytest.skip(used)
        benchmark.pedantic(
            lambda: engine_seconds.append(seconds(step)),
            setup=lambda: plain_seconds.append(seconds(passes)),
            rounds=ROUNDS,
        )
    bound = BLOCKS * len(plan.branches) / plan.block_rows
    row = record.Row(
        case=f"LTX-Video, {BLOCKS} blocks of {HEADS} x {HEAD_SIZE}, {FRAMES * HEIGHT * WIDTH} tokens, layer 19",
        plain=plain,
        kernels="off" if kernels == "off" else used,
        plain_seconds=statistics.median(plain_seconds),
        plain_iqr=quartile_range(plain_seconds),
        engine_seconds=statistics.median(engine_seconds),
        engine_iqr=quartile_range(engine_seconds),
        samples=len(engine_seconds),
        bound=bound,
        error=error,
        budget=budget,
        dtype="float32",
        **record.environment(torch.device("cpu")),
    )
    benchmark.extra_info.update(speedup=row.speedup, bound=bound, efficiency=row.speedup / bound)
    ratios = f"{row.speedup:.3f}x, bound {bound:.4f}, efficiency {row.speedup / bound:.3f}"
    print(f"\n{plain}, kernels {row.kernels}: {ratios}", file=sys.stderr)
    record.append(record.RESULTS / "engine.csv", [row])
