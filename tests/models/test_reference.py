"""The three-pass reference on every family, against the oracle of the family's tests."""

from dataclasses import replace

import pytest
import torch
from models.case import cases

from stg_engine import Denoiser, reference
from stg_engine.config import AudioGuidance, Skip, STGConfig

G = 3.0


@pytest.fixture(params=cases(), ids=str)
def case(request):
    return request.param


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


@torch.no_grad()
def test_passes(case):
    """Every mode and axis: one by one, and all rows in one call."""
    model = case.model(torch.float32)
    inputs = case.inputs(2, torch.float32)
    for skip in [skip for skip in case.skips() if len(skip.layers) > 1]:
        alone = case.passes(model, [skip], *inputs)
        for run in (reference.passes_one_by_one, reference.passes_in_one_batch):
            for i, branches in enumerate(outputs(run(model, [skip], *inputs))):
                assert branches.keys() == alone.keys()
                for name, branch in branches.items():
                    assert (branch - alone[name][i]).norm() < 1e-5 * branch.norm()
        assert (alone["skip"][0] - alone["cond"][0]).abs().max() > 1e-3


@torch.no_grad()
def test_guided_prediction(case):
    model = case.model(torch.float32)
    inputs = case.inputs(2, torch.float32)
    axis = case.axes[0]
    config = STGConfig(layers=(1,), scale=1.5, axis=axis, rescale=0.6, extra_skips=(Skip((0, 2), 0.5, axis=axis),))
    passes = case.passes(model, config.skips, *inputs)
    for one_batch in (False, True):
        guided = outputs(reference.three_passes(model, config, *inputs, G, one_batch=one_batch))
        assert len(guided) == len(passes["cond"])
        for i, prediction in enumerate(guided):
            c, u, p, q = (passes[name][i] for name in ("cond", "uncond", "skip", "skip2"))
            expected = u + G * (c - u) + 1.5 * (c - p) + 0.5 * (c - q)
            for video in range(2):
                expected[video] *= 0.6 * c[video].std() / expected[video].std() + 0.4
            assert (prediction - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("one_batch", [False, True])
@pytest.mark.parametrize("case", [case for case in cases() if case.name.startswith("LTX-2")], ids=str)
@torch.no_grad()
def test_video_and_audio(case, one_batch):
    """LTX-2's fourth pass and the audio's own scales, in the model's space and in x0."""
    model = case.model(torch.float32)
    shared, cond, uncond = case.inputs(2, torch.float32)
    config = STGConfig(layers=(1,), scale=1.5, mode="attention", modality_scale=3.0)
    passes = case.passes(model, config.skips, shared, cond, uncond)
    passes["modality"] = case.passes(model, (), shared | {"isolate_modalities": True}, cond, None)["cond"]
    arguments = (model, config.skips, shared, cond, uncond)
    run = reference.passes_in_one_batch if one_batch else reference.passes_one_by_one
    for i, branches in enumerate(run(*arguments, modality=True)):
        assert set(branches) == {"cond", "uncond", "skip", "modality"}
        for name, branch in branches.items():
            assert (branch - passes[name][i]).norm() < 1e-5 * branch.norm()
        assert (branches["modality"] - branches["cond"]).norm() > 1e-3 * branches["cond"].norm()
    audio = AudioGuidance(guidance_scale=7.0, scale=0.5, modality_scale=1.5, rescale=0.25)
    sigma = 0.4
    for changes in ({}, {"space": "x0", "rescale": 0.5}, {"audio": audio, "rescale": 0.5}):
        config_here = replace(config, **changes)
        guided = reference.three_passes(model, config_here, shared, cond, uncond, G, sigma=sigma, one_batch=one_batch)
        for i, prediction in enumerate(guided):
            g, s, mu, r = (7.0, 0.5, 1.5, 0.25) if i and "audio" in changes else (G, 1.5, 3.0, config_here.rescale)
            c, u, p, m = (passes[name][i] for name in ("cond", "uncond", "skip", "modality"))
            x = shared[("hidden_states", "audio_hidden_states")[i]]
            if config_here.space == "x0":
                c, u, p, m = (x - sigma * v for v in (c, u, p, m))
            expected = u + g * (c - u) + s * (c - p) + (mu - 1) * (c - m)
            for video in range(2):
                expected[video] *= r * c[video].std() / expected[video].std() + 1 - r
            if config_here.space == "x0":
                expected = (x - expected) / sigma
            assert (prediction - expected).norm() < 1e-4 * expected.norm()


@torch.no_grad()
def test_moved_inputs_are_rounding(case):
    model = case.model(torch.float32)
    shared, cond, uncond = case.inputs(1, torch.float32)

    def run():
        return outputs(reference.passes_one_by_one(model, (), shared, cond, uncond))

    exact = run()
    with reference.moved_block_inputs(model):
        moved = run()
    for i, branches in enumerate(exact):
        for name, branch in branches.items():
            distance = (moved[i][name] - branch).norm() / branch.norm()
            assert 1e-8 < distance < 1e-5
            assert torch.equal(run()[i][name], branch)


def test_hooked_models_are_refused():
    case = cases()[0]
    model, inputs = case.model(torch.float32), case.inputs(1, torch.float32)
    with Denoiser(model, STGConfig(layers=(1,))), pytest.raises(ValueError, match="detach"):
        reference.three_passes(model, STGConfig(layers=(1,)), *inputs, G)
