"""Every branch of a guided forward equals its pass run alone, in every family."""

from functools import lru_cache

import accelerate
import pytest
import torch
from models.case import cases, relative_error
from peft import LoraConfig

from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.hooks import hook_of
from stg_engine.models import spec_of, supported

FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
CASES = cases()
SKIPS = [(case, skip) for case in CASES for skip in case.skips()]


def _id(value):
    if isinstance(value, Skip):
        return "-".join(map(str, (value.mode, value.axis or "", *value.layers))).replace("--", "-")
    return str(value)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@lru_cache(maxsize=2)  # tests are grouped by case
def model_of(case, dtype):
    """For tests that leave it as it is."""
    return case.model(dtype)


def config_of(first, *others):
    return STGConfig(layers=first.layers, mode=first.mode, axis=first.axis, extra_skips=others)


def outputs(branches):
    """{"cond": [tensor, ...]}: models with two outputs have a dict for each."""
    each = branches if isinstance(branches, tuple) else (branches,)
    return {name: [output[name] for output in each] for name in each[0]}


@pytest.mark.parametrize("videos", [1, 3])
@pytest.mark.parametrize(("case", "skip"), SKIPS, ids=_id)
def test_branches_equal_passes_run_alone(case, skip, videos):
    model, config = model_of(case, torch.float32), config_of(skip)
    shared, cond, uncond = case.inputs(videos, torch.float32)
    expected = case.passes(model, config.skips, shared, cond, uncond)
    with Denoiser(model, config, kernels="off") as denoiser:
        for prompts in ((cond, uncond), (cond, uncond), (cond, None)):  # the second call takes what the first kept
            actual = outputs(denoiser.branches(shared, *prompts))
            assert set(actual) == set(expected) - ({"uncond"} if prompts[1] is None else set())
            for name, tensors in actual.items():
                for tensor, other in zip(tensors, expected[name], strict=True):
                    assert tensor.shape == other.shape
                    assert relative_error(tensor, other) <= FP32_RELATIVE, name
    effect = max(relative_error(a, b) for a, b in zip(expected["skip"], expected["cond"], strict=True))
    assert effect > 100 * FP32_RELATIVE, "the skip changes nothing"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_branches_that_share_nothing(case):
    skip, inputs = case.skips()[0], case.inputs(2, torch.float32)
    model = case.model(torch.float32)
    with Denoiser(model, config_of(skip)) as denoiser:
        shared = outputs(denoiser.branches(*inputs))
    with Denoiser(model, config_of(skip), share=False) as denoiser:
        assert denoiser.plans().block_rows > 2 * denoiser.plans().num_blocks
        for name, tensors in outputs(denoiser.branches(*inputs)).items():
            for tensor, other in zip(tensors, shared[name], strict=True):
                assert relative_error(tensor, other) <= FP32_RELATIVE, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("case", "skip"), SKIPS, ids=_id)
def test_serial_is_bitwise_equal_to_passes_run_alone(case, skip, dtype):
    model, config = model_of(case, dtype), config_of(skip)
    shared, cond, uncond = case.inputs(2, dtype)
    expected = case.passes(model, config.skips, shared, cond, uncond)
    with Denoiser(model, config, execution="serial", kernels="off") as denoiser:
        for _ in range(2):
            actual = outputs(denoiser.branches(shared, cond, uncond))
            for name in expected:
                if name != "skip" or skip.mode in case.bitwise:
                    for tensor, other in zip(actual[name], expected[name], strict=True):
                        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_skip_branches(case):
    """First and last layer, in all modes and axes at once, two rows at a time."""
    ends = [skip for skip in case.skips() if len(skip.layers) == 2]
    skips = [Skip((0,), mode=ends[0].mode, axis=ends[0].axis), *ends]
    model, config = case.model(torch.float32), config_of(*skips)
    shared, cond, uncond = case.inputs(2, torch.float32)
    expected = case.passes(model, config.skips, shared, cond, uncond)
    with Denoiser(model, config, max_rows=2, kernels="off") as denoiser:
        actual = outputs(denoiser.branches(shared, cond, uncond))
    assert set(actual) == set(expected)
    for name, tensors in actual.items():
        for tensor, other in zip(tensors, expected[name], strict=True):
            assert relative_error(tensor, other) <= FP32_RELATIVE, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_get_the_planned_rows_and_no_others(case):
    model = case.model(torch.float32)
    shared, cond, uncond = case.inputs(2, torch.float32)
    calls = []
    with Denoiser(model, config_of(Skip((case.layers // 2,), axis=case.axes[-1])), kernels="off") as denoiser:
        stream = denoiser.spec.streams[0]
        for block in denoiser.blocks:
            below = hook_of(block).fn_ref

            def spy(inner=below.original_forward, **arguments):
                calls.append(len(arguments[stream]))
                return inner(**arguments)

            below.original_forward = spy
        denoiser.branches(shared, cond, uncond)
        plan = denoiser.plans()
    assert len({len(names) for names in plan.rows}) > 1
    for place in range(len(case.axes)):  # frames or patches of a row, in a factorised model
        entries = [
            count / (2 * len(names))
            for count, names in list(zip(calls, plan.rows, strict=True))[place :: len(case.axes)]
            if names
        ]
        assert len(set(entries)) <= case.widths


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_adapter_on_every_linear(case):
    """Before and after it is on, and switched off again: nothing kept from step to step outlives it."""
    model = case.model(torch.float32)
    if not hasattr(model, "add_adapter"):
        pytest.skip(f"{type(model).__name__} takes no PEFT adapters")
    skip = Skip((1,), axis=case.axes[0])
    shared, cond, uncond = case.inputs(2, torch.float32)
    every_linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    torch.manual_seed(0)
    with Denoiser(model, config_of(skip), kernels="off") as denoiser:
        plain = outputs(denoiser.branches(shared, cond, uncond))
    model.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=every_linear))
    expected = case.passes(model, [skip], shared, cond, uncond)
    with Denoiser(model, config_of(skip), kernels="off") as denoiser:
        actual = outputs(denoiser.branches(shared, cond, uncond))
        model.disable_adapters()
        without = outputs(denoiser.branches(shared, cond, uncond))
    for name in expected:
        for tensor, other, same, before in zip(actual[name], expected[name], without[name], plain[name], strict=True):
            assert relative_error(tensor, other) <= FP32_RELATIVE, name
            assert relative_error(tensor, before) > 100 * FP32_RELATIVE, "the adapter changes nothing"
            assert relative_error(same, before) <= FP32_RELATIVE, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_offloaded_weights(case):
    """Accelerate moves every module's weights in for its call and out behind it."""
    skip = Skip((1,), axis=case.axes[0])
    shared, cond, uncond = case.inputs(1, torch.float32)
    with Denoiser(case.model(torch.float32), config_of(skip)) as denoiser:
        expected = outputs(denoiser.branches(shared, cond, uncond))
    model = accelerate.cpu_offload(case.model(torch.float32), execution_device=torch.device("cpu"))
    with Denoiser(model, config_of(skip)) as denoiser:
        for _ in range(2):
            actual = outputs(denoiser.branches(shared, cond, uncond))
            for name in expected:
                for tensor, other in zip(actual[name], expected[name], strict=True):
                    assert relative_error(tensor, other) <= FP32_RELATIVE, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_skips_under_autocast(case):
    """Some norms return float32 there, beside values in bfloat16."""
    if "attention" not in case.modes:
        pytest.skip("no attention skip")
    model, skip = model_of(case, torch.float32), Skip((1,), mode="attention", axis=case.axes[0])
    inputs = case.inputs(1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = case.passes(model, [skip], *inputs)
        with Denoiser(model, config_of(skip)) as denoiser:
            actual = outputs(denoiser.branches(*inputs))
    for name in expected:
        for tensor, other in zip(actual[name], expected[name], strict=True):
            assert relative_error(tensor.float(), other.float()) <= 3e-2, name


def test_every_family_is_tested():
    tested = {spec_of(type(case.model(torch.float32))).family for case in CASES}
    assert tested >= {spec.family for spec in supported()} - {"LTX-Video"}  # tests/engine
