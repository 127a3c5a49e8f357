"""attach() on every supported pipeline: the latents of a run in which every pass is a call of its own."""

import pytest
import torch
from models.case import relative_error
from models.pipeline_case import passes_apart, pipeline_cases

import stg_engine
from stg_engine import Skip, STGConfig
from stg_engine.calls import PIPELINES

CASES = pipeline_cases()
STEPS = [(case, guided) for case in CASES for guided in ((True, False) if case.plain is not None else (True,))]
FP32_RELATIVE = 2e-5
"""Of latents: 2e-6 of a branch, times the scales, over three steps."""


def _id(value):
    return {True: "cfg", False: "no_cfg"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def config_of(case, mode, scale=1.5):
    family = case.case
    axis = family.axes[0]
    others = tuple(Skip((family.layers - 1,), 0.5, mode, other) for other in family.axes[1:])
    return STGConfig(layers=(1,), scale=scale, mode=mode, axis=axis, extra_skips=others)


@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("mode", ["residual", "attention"])
@pytest.mark.parametrize(("case", "guided"), STEPS, ids=_id)
def test_latents_equal_those_of_passes_apart(case, guided, mode, videos):
    pipe, config = case.build(), config_of(case, mode)
    plain = case.latents(pipe, videos, guided=guided)
    with passes_apart(pipe, case, config.skips, guided=guided):
        expected = case.latents(pipe, videos, guided=guided)
    with stg_engine.attach(pipe, config) as engine:
        actual = case.latents(pipe, videos, guided=guided)
        report = engine.report()
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected) <= FP32_RELATIVE
    assert relative_error(plain, expected) > 100 * FP32_RELATIVE, "the skip changes nothing"
    assert report.guided_steps == report.steps == case.call["num_inference_steps"]
    assert ("uncond" in str(report.plan)) == guided
    assert torch.equal(case.latents(pipe, videos, guided=guided), plain), "detach left something"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scale_0_is_the_plain_pipeline(case):
    pipe = case.build()
    plain = case.latents(pipe)
    with stg_engine.attach(
        pipe,
        config_of(case, "residual", scale=0.0)
        if len(case.case.axes) == 1
        else STGConfig(layers=(1,), scale=0.0, axis=case.case.axes[0]),
    ):
        assert torch.equal(case.latents(pipe), plain)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_window_is_plain_outside(case):
    pipe, config = case.build(), config_of(case, "residual")
    window = STGConfig(layers=config.layers, scale=1.5, axis=config.axis, start=0.3, stop=0.6)
    with stg_engine.attach(pipe, window) as engine:
        latents = case.latents(pipe)
        assert engine.report().guided_steps == 1
    assert latents.isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_exception_in_a_step_leaves_the_pipeline_usable(case):
    pipe, config = case.build(), config_of(case, "residual")

    def stop(pipe, index, timestep, tensors):
        raise KeyboardInterrupt

    with stg_engine.attach(pipe, config):
        expected = case.latents(pipe)
        with pytest.raises(KeyboardInterrupt):
            case.latents(pipe, callback_on_step_end=stop)
        assert torch.equal(case.latents(pipe), expected)


def test_every_pipeline_is_tested():
    assert {case.name for case in CASES} >= set(PIPELINES) - {
        "LTXPipeline",  # tests/engine/test_pipeline.py
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",
        "LTX2Pipeline",  # tests/models/test_ltx2_pipelines.py
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",
    }
