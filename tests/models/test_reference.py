"""The three-pass reference on every family of one output, against the oracle of the family's tests."""

import pytest
import torch
from models.case import cases

from stg_engine import Denoiser, reference
from stg_engine.config import Skip, STGConfig
from stg_engine.models import spec_of

G = 3.0


def known():
    return [case for case in cases() if not spec_of(case.model(torch.float32)).links]


@pytest.fixture(params=known(), ids=str)
def case(request):
    return request.param


@torch.no_grad()
def test_passes(case):
    """Every mode and axis: one by one, and all rows in one call."""
    model = case.model(torch.float32)
    inputs = case.inputs(2, torch.float32)
    for skip in [skip for skip in case.skips() if len(skip.layers) > 1]:
        alone = case.passes(model, [skip], *inputs)
        for run in (reference.passes_one_by_one, reference.passes_in_one_batch):
            branches = run(model, [skip], *inputs)
            assert branches.keys() == alone.keys()
            for name, branch in branches.items():
                assert (branch - alone[name][0]).norm() < 1e-5 * branch.norm()
        assert (alone["skip"][0] - alone["cond"][0]).abs().max() > 1e-3


@torch.no_grad()
def test_guided_prediction(case):
    model = case.model(torch.float32)
    inputs = case.inputs(2, torch.float32)
    axis = case.axes[0]
    config = STGConfig(layers=(1,), scale=1.5, axis=axis, rescale=0.6, extra_skips=(Skip((0, 2), 0.5, axis=axis),))
    passes = case.passes(model, config.skips, *inputs)
    c, u, p, q = (passes[name][0] for name in ("cond", "uncond", "skip", "skip2"))
    expected = u + G * (c - u) + 1.5 * (c - p) + 0.5 * (c - q)
    for video in range(2):
        expected[video] *= 0.6 * c[video].std() / expected[video].std() + 0.4
    for one_batch in (False, True):
        guided = reference.three_passes(model, config, *inputs, G, one_batch=one_batch)
        assert (guided - expected).norm() < 1e-4 * expected.norm()


@torch.no_grad()
def test_moved_inputs_are_rounding(case):
    model = case.model(torch.float32)
    shared, cond, uncond = case.inputs(1, torch.float32)
    exact = reference.passes_one_by_one(model, (), shared, cond, uncond)
    with reference.moved_block_inputs(model):
        moved = reference.passes_one_by_one(model, (), shared, cond, uncond)
    for name, branch in exact.items():
        distance = (moved[name] - branch).norm() / branch.norm()
        assert 1e-8 < distance < 1e-5
        assert torch.equal(reference.passes_one_by_one(model, (), shared, cond, uncond)[name], branch)


def test_models_of_two_outputs_and_hooked_ones_are_refused():
    two = next(case for case in cases() if spec_of(case.model(torch.float32)).links)
    model, inputs = two.model(torch.float32), two.inputs(1, torch.float32)
    with pytest.raises(TypeError, match="video and audio"):
        reference.three_passes(model, STGConfig(layers=(1,)), *inputs, G)
    case = known()[0]
    model, inputs = case.model(torch.float32), case.inputs(1, torch.float32)
    with Denoiser(model, STGConfig(layers=(1,))), pytest.raises(ValueError, match="detach"):
        reference.three_passes(model, STGConfig(layers=(1,)), *inputs, G)
