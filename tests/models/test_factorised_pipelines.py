"""Latte and Stable Video Diffusion as pipelines: scales per frame, dtypes that schedulers hand on, what is refused."""

import pytest
import torch
from models.case import relative_error
from models.families import svd as svd_model
from models.pipelines import latte, svd

import stg_engine
from stg_engine import ScheduleEntry, Skip, STGConfig, STGSchedule

BOTH = STGConfig(  # STG-A of one layer, spatial and temporal
    layers=(2,), scale=2.0, mode="attention", axis="spatial", extra_skips=(Skip((2,), 0.5, "attention", "temporal"),)
)
(LATTE,), (SVD,) = latte.CASES, svd.CASES


@pytest.mark.parametrize("videos", [1, 2])
def test_scale_per_frame(videos):
    """The first frame has g = 1: c + D; the last one g = 3: u + 3 (c - u) + D. One step of Euler, by hand."""
    pipe = SVD.build()
    seen = []

    def noted(*args, inner=pipe.unet.forward, **kwargs):
        seen.append((args, kwargs))
        return inner(*args, **kwargs)

    pipe.unet.forward = noted
    SVD.latents(pipe, videos, num_inference_steps=1)
    del pipe.unet.forward
    (sample, timestep), rest = seen[0]
    with torch.no_grad():
        u, c = pipe.unet(sample, timestep, **rest)[0].chunk(2)
        terms = []
        for skip in BOTH.skips:
            with svd_model.skipped(pipe.unet, skip):
                terms.append(skip.scale * (c - pipe.unet(sample, timestep, **rest)[0].chunk(2)[1]))
    g = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)
    guided = u + g * (c - u) + sum(terms)

    given = []

    def stepped(prediction, *args, inner=pipe.scheduler.step, **kwargs):
        given.append(prediction)
        return inner(prediction, *args, **kwargs)

    pipe.scheduler.step = stepped
    with stg_engine.attach(pipe, BOTH) as engine:
        SVD.latents(pipe, videos, num_inference_steps=1)
        assert list(engine.plan.forks) == ["uncond", "skip", "skip2"]
    assert relative_error(given[0], guided) < 1e-5


@pytest.mark.parametrize("case", [LATTE, SVD], ids=str)
def test_half_precision_stays(case):
    """Both schedulers return latents in the dtype of the prediction, which the model has to take in the next step."""
    pipe = case.build(torch.bfloat16)
    plain = case.latents(pipe)
    with stg_engine.attach(pipe, BOTH):
        latents = case.latents(pipe)
    assert latents.dtype == plain.dtype
    assert latents.isfinite().all()
    assert not torch.equal(latents, plain)


def test_schedules_are_refused_by_noise_levels_beyond_1():
    pipe = SVD.build()
    schedule = STGSchedule((ScheduleEntry(1.0, scale=1.0, layers=(1,)),), rule="at_or_below")
    with (
        stg_engine.attach(pipe, STGConfig(schedule=schedule, axis="spatial")),
        pytest.raises(ValueError, match=r"sigma=700.* between 0 and 1"),
    ):
        SVD.latents(pipe)


def test_latte_without_temporal_attention():
    """`enable_temporal_attentions=False`: temporal blocks do not run, and skipping one changes nothing."""
    pipe = LATTE.build()
    plain = LATTE.latents(pipe, enable_temporal_attentions=False)
    with stg_engine.attach(pipe, STGConfig(layers=(1,), axis="spatial")):
        assert not torch.equal(LATTE.latents(pipe, enable_temporal_attentions=False), plain)
    with stg_engine.attach(pipe, STGConfig(layers=(1,), axis="temporal")):
        assert relative_error(LATTE.latents(pipe, enable_temporal_attentions=False), plain) < 2e-5


@pytest.mark.parametrize(
    ("case", "path"),
    [
        (LATTE, "transformer_blocks.0.attn2.to_k"),
        (SVD, "mid_block.attentions.0.temporal_transformer_blocks.0.attn2.to_v"),
    ],
    ids=str,
)
def test_prompt_is_projected_once_per_call(case, path):
    pipe = case.build()
    module, calls = getattr(pipe, case.models[0]).get_submodule(path), []

    def counted(*args, inner=module.forward):
        calls.append(args)
        return inner(*args)

    module.forward = counted
    with stg_engine.attach(pipe, BOTH) as engine:
        case.latents(pipe)
        assert engine.report().guided_steps == 3
        assert len(calls) == 1
        case.latents(pipe)
        assert len(calls) == 2
