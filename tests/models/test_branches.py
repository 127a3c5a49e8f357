"""Every branch of a guided forward equals its pass run alone, in every family."""

import pytest
import torch
from models.case import cases, relative_error

from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.hooks import hook_of

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


def config_of(first, *others):
    return STGConfig(layers=first.layers, mode=first.mode, axis=first.axis, extra_skips=others)


def outputs(branches):
    """{"cond": [tensor, ...]}: models with two outputs have a dict for each."""
    each = branches if isinstance(branches, tuple) else (branches,)
    return {name: [output[name] for output in each] for name in each[0]}


@pytest.mark.parametrize("videos", [1, 2, 3])
@pytest.mark.parametrize(("case", "skip"), SKIPS, ids=_id)
def test_branches_equal_passes_run_alone(case, skip, videos):
    model, config = case.model(torch.float32), config_of(skip)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("case", "skip"), SKIPS, ids=_id)
def test_serial_is_bitwise_equal_to_passes_run_alone(case, skip, dtype):
    model, config = case.model(dtype), config_of(skip)
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
