"""The cost model against a count of the guided step itself, in every family; its formula, its words, its refusals."""

from dataclasses import replace

import pytest
import torch
from models.case import cases
from torch import Tensor

from stg_engine import Denoiser, Skip, STGConfig, reference
from stg_engine.bench.cost import TOLERANCE, BlockCosts, Ceilings, Cost, count, disagreement, step_cost
from stg_engine.bench.count import Counter, Place, Work
from stg_engine.models import modules_at, spec_of

# One of each structure. Not among them, for what a row costs there depends on the others: Open-Sora, which packs its
# prompts into one sequence, and LTX-2.3-image, whose tokens have timesteps, of which each value is embedded once.
NAMES = (
    *("Allegro", "CogVideoX-2B", "CogVideoX-1.5-I2V", "Cosmos 2.0", "HunyuanVideo", "HunyuanVideo-1.5-image"),
    *("Latte, a video with masks", "LTX-2", "LTX-2.3", "Mochi", "Sana-Video", "SVD", "SkyReels-V2 DF", "Wan I2V"),
)
CASES = {case.name: case for case in cases() if case.name in NAMES}
CEILINGS = Ceilings(matmul=1e12, attention=5e11, copy=1e11)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def built(name, dtype=torch.float32):
    """A model, its spec and its inputs: one video, uncond's prompt as long as cond's, for Mochi drops the padding."""
    model = CASES[name].model(dtype)
    shared, cond, uncond = CASES[name].inputs(1, dtype)
    masks = {key: value for key, value in cond.items() if "mask" in key}
    return model, spec_of(model), shared, cond, {**uncond, **masks}


def repeated(spec, videos, inputs):
    """Video 0 as often."""

    def rows(name, value):
        has_rows = name in (*spec.latents, *spec.prompt) and isinstance(value, Tensor) and value.ndim
        return value.repeat(videos, *[1] * (value.ndim - 1)) if has_rows else value

    return None if inputs is None else {name: rows(name, value) for name, value in inputs.items()}


def counted(model, call, *args, **kwargs):
    with Counter(model) as counter:
        call(*args, **kwargs)
    work = sum(counter.work.values(), Work())
    return Cost(work.gemm_flops, work.attention_flops, work.activation_bytes + work.weight_bytes)


def steps(case):
    """Skips, and whether there is an uncond, is sharing, are two videos: each value in every mode and axis."""
    for axis in case.axes:
        yield from ((Skip((1,), mode=mode, axis=axis), True, True, 2) for mode in case.modes)
    several = (1, case.layers - 1)
    yield Skip(several, mode=case.modes[0], axis=case.axes[0]), False, True, 1
    yield Skip(several, mode=case.modes[-1], axis=case.axes[-1]), True, False, 1


@pytest.mark.parametrize("name", CASES)
def test_a_guided_step_costs_what_its_operations_cost(name):
    model, spec, *inputs = built(name)
    costs = count(model, spec, *inputs[:2])
    for skip, has_uncond, share, videos in steps(CASES[name]):
        shared, cond, uncond = (repeated(spec, videos, group) for group in inputs)
        uncond = uncond if has_uncond else None
        config = STGConfig(skip.layers, mode=skip.mode, axis=skip.axis, modality_scale=3.0 if spec.links else 1.0)
        with Denoiser(model, config, kernels="off", share=share) as denoiser:
            denoiser.branches(shared, cond, uncond)  # what follows from the prompt is kept from here on
            actual = counted(model, denoiser.branches, shared, cond, uncond)
            plan = denoiser.plans(uncond=has_uncond)
        assert step_cost(costs, plan, videos) == actual, (skip, has_uncond, share, videos)


@pytest.mark.parametrize("name", ["Cosmos 2.0", "HunyuanVideo", "Mochi", "SVD", "Wan I2V"])
def test_plain_passes_cost_what_their_operations_cost(name):
    model, spec, *inputs = built(name)
    costs = count(model, spec, *inputs[:2])
    inputs = [repeated(spec, 2, group) for group in inputs]
    for run, max_rows in ((reference.passes_in_one_batch, None), (reference.passes_one_by_one, 2)):
        actual = counted(model, run, model, (), *inputs)
        expected = step_cost(costs, None, 2, passes=2, max_rows=max_rows)
        assert expected == actual, run.__name__


@pytest.mark.parametrize("name", ["LTX-2.3", "Latte, a video with masks", "SVD"])
def test_a_serial_step_reads_weights_for_each_row(name):
    model, spec, shared, cond, uncond = built(name)
    costs = count(model, spec, shared, cond)
    config = STGConfig((1,), axis=CASES[name].axes[0])
    with Denoiser(model, config, kernels="off", execution="serial") as denoiser:
        denoiser.branches(shared, cond, uncond)
        actual = counted(model, denoiser.branches, shared, cond, uncond)
        plan = denoiser.plans()
    assert step_cost(costs, plan, max_rows=1) == actual
    assert step_cost(costs, plan).moved_bytes < actual.moved_bytes


def test_a_larger_model_by_the_formulas_of_its_layers():
    """LTX-Video with 2 blocks of 4 heads of 32, by hand."""
    from diffusers import LTXVideoTransformer3DModel

    heads, size, text, tokens, channels = 4, 32, 7, 96, 16
    c = heads * size
    model = LTXVideoTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=heads,
        attention_head_dim=size,
        cross_attention_dim=c,
        caption_channels=24,
        num_layers=2,
    ).eval()
    shared = {
        "hidden_states": torch.randn(1, tokens, channels),
        "timestep": torch.tensor([500.0]),
        "num_frames": 4,
        "height": 4,
        "width": 6,
    }
    cond = {"encoder_hidden_states": torch.randn(1, text, 24), "encoder_attention_mask": torch.ones(1, text)}
    costs = count(model, spec_of(model), shared, cond)
    square, feed_forward = 2 * tokens * c * c, 2 * 2 * tokens * c * 4 * c
    for block in (0, 1):
        attention, rest = costs.of("attention", block), costs.of("block", block)
        assert (attention.gemm_flops, attention.attention_flops) == (4 * square, 4 * tokens * tokens * c)
        assert (rest.gemm_flops, rest.attention_flops) == (2 * square + feed_forward, 4 * tokens * text * c)
        assert costs.of("skipping", block) == replace(
            costs.of("skipping", block), gemm_flops=2 * square, attention_flops=0, weight_bytes=4 * 2 * c * c
        )
        assert attention.weight_bytes == 4 * 4 * c * c
        # In and out of three projections, of the attention, of the last projection.
        assert attention.activation_bytes == 4 * tokens * c * (3 * 2 + 4 + 2)
    assert costs.of("once per prompt").gemm_flops == 2 * text * (24 * c + c * c + 2 * 2 * c * c)
    assert costs.of("outside").gemm_flops == 2 * tokens * c * channels
    per_block = [costs.of("attention", 0) + costs.of("block", 0), costs.of("skipping", 0)]
    with Denoiser(model, STGConfig((1,), mode="attention"), kernels="off") as denoiser:
        plan = denoiser.plans()
    # Block 0: self-attention once, two rows behind it. Block 1: three rows, of which one skips its self-attention.
    flops = costs.of("attention", 0).gemm_flops + 2 * costs.of("block", 0).gemm_flops
    flops += 2 * per_block[0].gemm_flops + per_block[1].gemm_flops + costs.of("block", 0).gemm_flops
    flops += 3 * costs.of("outside").gemm_flops + costs.of("once per step").gemm_flops
    assert step_cost(costs, plan).gemm_flops == flops


def test_meta_tensors_cost_the_same():
    for name in ("CogVideoX-2B", "LTX-2.3"):
        model, spec, shared, cond, _ = built(name)
        costs = count(model, spec, shared, cond)

        def on_meta(inputs):
            return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}

        assert count(model.to("meta"), spec, on_meta(shared), on_meta(cond)) == costs, name


def test_inference_mode_costs_the_same():
    model, spec, shared, cond, _ = built("Wan I2V")
    costs = count(model, spec, shared, cond)
    with torch.inference_mode():
        model, spec, shared, cond, _ = built("Wan I2V")
        assert count(model, spec, shared, cond) == costs


def test_counting_leaves_the_model_as_it_was():
    model, spec, shared, cond, _ = built("Wan I2V")
    before = model(**shared, **cond, return_dict=False)[0]
    count(model, spec, shared, cond)
    assert torch.equal(model(**shared, **cond, return_dict=False)[0], before)
    modules = modules_at(model, ("", *spec.blocks)[1:])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_attention_without_sdpa_is_attention():
    """Two products of activations, whoever writes them; a product with a weight is a GEMM."""
    model = torch.nn.Linear(8, 8)
    x = torch.randn(2, 5, 8)
    with Counter(model) as counter:
        model(x)
        torch.softmax(x @ x.transpose(1, 2), -1) @ x
    work = counter.work[Place("once")]
    assert (work.gemm_flops, work.attention_flops) == (2 * 10 * 8 * 8, 4 * 2 * 5 * 5 * 8)


@pytest.mark.parametrize("x", [torch.randn(6, 5, 64), torch.randn(6, 9, 64)[:, 1:6]], ids=["dense", "strided"])
def test_a_weight_is_read_once(x):
    """`linear` of a strided input multiplies by an expanded weight, and adds the bias behind it."""
    model = torch.nn.Linear(64, 32).requires_grad_(False)
    with Counter(model) as counter:
        model(x)
    assert counter.work[Place("once")] == Work(2 * 30 * 64 * 32, 0, 4 * 30 * (64 + 32), 4 * 64 * 32)


def test_seconds_and_words():
    cost = Cost(2_345_000_000_000, 450_000_000_000, 12_300_000_000)
    assert cost.seconds(CEILINGS) == pytest.approx(2.345 + 0.9 + 0.123)
    assert str(cost) == "2.35 TFLOP GEMM + 450 GFLOP attention + 12.3 GB"
    ceilings = "1 TFLOP/s in GEMMs, 500 GFLOP/s in attention, 100 GB/s"
    assert cost.at(CEILINGS) == f"{cost} = 3.37e+03 ms at {ceilings}"
    assert str(Cost()) == "0 FLOP GEMM + 0 FLOP attention + 0 B"
    assert str(Cost(999_900, 1, 999)) == "1 MFLOP GEMM + 1 FLOP attention + 999 B"


def test_disagreement():
    for ratio in (1.0, 1 + 0.99 * TOLERANCE, 1 - 0.99 * TOLERANCE):
        assert disagreement(ratio, 1.0) == ""
    assert disagreement(1.3e-3, 1e-3).startswith("1.3 ms is 1.30x the ideal 1 ms, beyond 15%: launches")
    assert "ceiling measured too low" in disagreement(0.8, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Ceilings(1e12, 0.0, 1e9), "attention=0.0 is not allowed"),
        (lambda: Ceilings(float("nan"), 1.0, 1e9), "matmul=nan is not allowed"),
        (lambda: step_cost(BlockCosts({}, 4), None), "pass one of them"),
        (lambda: step_cost(BlockCosts({}, 4), None, passes=0), "passes=0 is not allowed"),
        (lambda: step_cost(BlockCosts({}, 4), None, 0, passes=1), "videos=0 is not allowed"),
        (lambda: step_cost(BlockCosts({}, 4), None, passes=1, max_rows=0), "max_rows=0 is not allowed"),
        (lambda: disagreement(0.0, 1.0), "measured=0.0 is not allowed"),
        (lambda: disagreement(1.0, 0.0), "ideal=0.0 is not allowed"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_cannot_be_counted():
    model, spec, shared, cond, _ = built("Wan I2V")
    costs = count(model, spec, shared, cond)
    two = [repeated(spec, 2, group) for group in (shared, cond)]
    with pytest.raises(ValueError, match="2 videos"):
        count(model, spec, *two)
    with Denoiser(model, STGConfig((1,))) as denoiser:
        with pytest.raises(ValueError, match="detach"):
            count(model, spec, shared, cond)
        plan = denoiser.plans()
    with pytest.raises(ValueError, match="plan has 4 blocks, the transformer that was counted 3"):
        step_cost(replace(costs, blocks=3), plan)
    with pytest.raises(ValueError, match="pass one of them"):
        step_cost(costs, plan, passes=3)
