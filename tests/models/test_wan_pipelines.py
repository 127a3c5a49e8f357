"""Wan and SkyReels-V2 pipelines: one forward per step, changes during a call, two transformers, schedules."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel, WanPipeline
from models.case import relative_error
from models.families import wan
from models.pipeline_case import passes_apart
from models.pipelines.wan import CASES, build, embeddings, euler, picture, unipc

import stg_engine
from stg_engine import ScheduleEntry, Skip, STGConfig, STGSchedule

BY_NAME = {case.name: case for case in CASES}
CONFIG = STGConfig(layers=(1,), scale=1.5)
FP32_RELATIVE = 2e-5


@contextmanager
def rows_of_calls(pipe, path, names=("transformer",)):
    """[(name of the transformer, rows)] of every call of its module at `path`, below the engine's hooks."""
    calls, spied = [], []
    for name in names:
        module = getattr(pipe, name).get_submodule(path)

        def spy(x, *args, inner=module.forward, name=name, **kwargs):
            calls.append((name, len(x)))
            return inner(x, *args, **kwargs)

        module.forward = spy
        spied.append(module)
    yield calls
    for module in spied:
        del module.forward


def both_ways(case, config=CONFIG, pipe=None, videos=1, skips=None, **arguments):
    """(latents with the engine, latents of passes apart); a function in `arguments` is made anew for each."""
    pipe = case.build() if pipe is None else pipe

    def run():
        made = {name: value() if callable(value) else value for name, value in arguments.items()}
        return case.latents(pipe, videos, **made)

    with stg_engine.attach(pipe, config):
        actual = run()
    with passes_apart(pipe, case, config.skips if skips is None else skips(), guided=True):
        expected = run()
    return actual, expected


@pytest.mark.parametrize("name", ["WanPipeline", "WanImageToVideoPipeline", "SkyReelsV2ImageToVideoPipeline"])
def test_a_step_is_one_forward_and_projects_no_prompt_anew(name):
    case = BY_NAME[name]
    pipe = case.build()
    with (
        rows_of_calls(pipe, "blocks.3.ffn") as blocks,
        rows_of_calls(pipe, "blocks.3.attn2.to_k") as keys,
        rows_of_calls(pipe, "patch_embedding") as patches,
        stg_engine.attach(pipe, CONFIG),
    ):
        case.latents(pipe, 2)
    assert blocks == [("transformer", 6)] * 3
    assert keys == [("transformer", 6)]
    assert patches == [("transformer", 2)] * 3


@pytest.mark.parametrize("name", ["WanPipeline 2.2", "WanImageToVideoPipeline 2.2"])
def test_each_of_two_transformers_has_its_guidance_scale(name):
    case = BY_NAME[name]
    pipe = case.build()
    names = ("transformer", "transformer_2")
    with rows_of_calls(pipe, "blocks.3.ffn", names) as calls, stg_engine.attach(pipe, CONFIG) as engine:
        latents = case.latents(pipe)
        assert [denoiser.differences["skip"] > 0 for denoiser in engine.denoisers] == [True, True]
        other = case.latents(pipe, guidance_scale_2=4.0)
        same = case.latents(pipe, guidance_scale_2=None)
    assert {model for model, _ in calls} == set(names)
    assert {rows for _, rows in calls} == {3}
    assert torch.equal(other, same)
    assert not torch.equal(other, latents)


def test_a_second_guidance_scale_of_1_keeps_the_skip():
    actual, expected = both_ways(BY_NAME["WanPipeline 2.2"], guidance_scale_2=1.0)
    assert relative_error(actual, expected) <= FP32_RELATIVE


def test_the_second_transformer_alone():
    pipe = build(WanPipeline, unipc, transformers=2, options={"boundary_ratio": 1.1})
    pipe.transformer = None
    actual, expected = both_ways(BY_NAME["WanPipeline 2.2"], pipe=pipe)
    assert relative_error(actual, expected) <= FP32_RELATIVE


def at_step(index, change):
    """A callback that calls `change(pipe, tensors)` after one step and returns what it returns."""

    def callback(pipe, step, timestep, tensors):
        return change(pipe, tensors) or {} if step == index else {}

    return callback


def other_prompts(pipe, tensors):
    return {name: value.flip(1) * 0.5 for name, value in tensors.items() if "prompt" in name}


def write_prompts(pipe, tensors):
    tensors["prompt_embeds"].mul_(0.5)


def stop(pipe, tensors):
    pipe._interrupt = True


def no_guidance(pipe, tensors):
    pipe._guidance_scale = 1.0


def another_scale(pipe, tensors):
    pipe._guidance_scale = 9.0  # the loop has read it


CHANGES = [other_prompts, write_prompts, stop, another_scale]


@pytest.mark.parametrize("name", ["WanPipeline", "WanImageToVideoPipeline", "SkyReelsV2Pipeline", "WanPipeline 2.2"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_by_a_callback(name, change):
    case = BY_NAME[name]
    given = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "negative_prompt_embeds"]}
    if case.prompts is not embeddings:
        given |= {"prompt": None, "negative_prompt": None}
    for key in embeddings(1):  # made anew for every run: one change writes into them
        given[key] = partial(lambda key: embeddings(1)[key], key)
    unchanged, _ = both_ways(case, **given)
    actual, expected = both_ways(case, **given, callback_on_step_end=lambda: at_step(0, change))
    assert relative_error(actual, expected) <= FP32_RELATIVE
    assert torch.equal(actual, unchanged) == (change is another_scale)


def test_guidance_switched_off_by_a_callback():
    case = BY_NAME["WanPipeline"]
    pipe = case.build()
    with rows_of_calls(pipe, "blocks.3.ffn") as calls, stg_engine.attach(pipe, CONFIG):
        latents = case.latents(pipe, callback_on_step_end=at_step(0, no_guidance))
    assert [rows for _, rows in calls] == [3, 2, 2]
    assert latents.isfinite().all()


class PerStep:
    """Skips that `passes_apart` reads anew in each step."""

    def __init__(self, *skips):
        self.skips = iter(skips)

    def __iter__(self):
        return iter(next(self.skips))


@pytest.mark.parametrize("scheduler", [euler, unipc])
@pytest.mark.parametrize("name", ["WanPipeline", "WanPipeline 2.2", "SkyReelsV2Pipeline"])
def test_a_schedule_per_sigma(name, scheduler):
    case = BY_NAME[name]
    pipe = case.build()
    pipe.scheduler = scheduler()
    entries = (ScheduleEntry(0.97, (0,), 1.0), ScheduleEntry(0.9, (1, 2), 2.0), ScheduleEntry(0.0, (3,), 0.5))
    config = STGConfig(schedule=STGSchedule(entries, "at_or_below"))
    pipe.scheduler.set_timesteps(5)
    index = [next(i for i, entry in enumerate(entries) if entry.sigma <= s) for s in pipe.scheduler.sigmas[:5]]
    assert set(index) == {0, 1, 2}
    skips = [[Skip(entries[i].layers, entries[i].scale)] for i in index]
    actual, expected = both_ways(case, config, pipe, skips=lambda: PerStep(*skips), num_inference_steps=5)
    assert relative_error(actual, expected) <= 5 * FP32_RELATIVE


def test_a_schedule_sets_guidance_scales():
    case = BY_NAME["WanPipeline 2.2"]
    pipe = case.build()
    entries = (ScheduleEntry(0.97, (0,), 1.0, guidance_scale=1.0), ScheduleEntry(0.0, (3,), 0.5, guidance_scale=3.0))
    config = STGConfig(schedule=STGSchedule(entries, "at_or_below"))
    names = ("transformer", "transformer_2")
    with rows_of_calls(pipe, "blocks.3.ffn", names) as calls, stg_engine.attach(pipe, config) as engine:
        first = case.latents(pipe)
        assert first.isfinite().all()
        assert torch.equal(first, case.latents(pipe, guidance_scale=7.0, guidance_scale_2=2.0))
        assert "guidance scales 1, 3 are the schedule's" in engine.report().note
    assert [rows for _, rows in calls[:3]] == [2, 2, 2]  # c and p; then u and c: the last block of p is passed through


def test_part_of_the_steps():
    case = BY_NAME["WanVideoToVideoPipeline"]
    pipe = case.build()
    with stg_engine.attach(pipe, CONFIG) as engine:
        case.latents(pipe, strength=0.5, num_inference_steps=4)
        assert engine.report().guided_steps == engine.report().steps == 2
    actual, expected = both_ways(case, pipe=pipe, strength=0.5, num_inference_steps=4)
    assert relative_error(actual, expected) <= FP32_RELATIVE


def test_several_videos_per_prompt():
    case = BY_NAME["WanPipeline"]
    generators = [torch.Generator() for _ in range(4)]
    actual, expected = both_ways(
        case,
        videos=2,
        num_videos_per_prompt=2,
        generator=lambda: [generator.manual_seed(i) for i, generator in enumerate(generators)],
    )
    assert len(actual) == 4
    assert relative_error(actual, expected) <= FP32_RELATIVE


def test_half_precision():
    case = BY_NAME["WanPipeline"]
    pipe = case.build()
    pipe.transformer = wan.as_loaded(pipe.transformer, torch.bfloat16)
    plain = case.latents(pipe)
    with stg_engine.attach(pipe, CONFIG):
        actual = case.latents(pipe)
    with passes_apart(pipe, case, CONFIG.skips, guided=True):
        expected = case.latents(pipe)
    assert pipe.transformer.dtype == torch.bfloat16
    assert relative_error(actual, expected) < 0.2 * relative_error(plain, expected)


def test_a_model_that_is_called_once_more_is_refused():
    case = BY_NAME["SkyReelsV2Pipeline"]
    pipe = case.build()

    def ask(pipe, tensors):
        latents = torch.zeros(1, 16, 1, 4, 4)
        pipe.transformer(latents, torch.tensor([1.0]), embeddings(1)["prompt_embeds"])

    with (
        stg_engine.attach(pipe, CONFIG),
        pytest.raises(RuntimeError, match="more often than 2 times in a step of the SkyReelsV2Pipeline"),
    ):
        case.latents(pipe, callback_on_step_end=at_step(0, ask))


def test_an_answer_that_was_copied_before_it_is_filled_is_an_error():
    """The copy would stay NaN."""
    case = BY_NAME["WanPipeline"]
    pipe = case.build()
    with stg_engine.attach(pipe, CONFIG):
        expected = case.latents(pipe)
        hook = pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] * 1.0,))
        with pytest.raises(RuntimeError, match="was copied before the second call"):
            case.latents(pipe)
        hook.remove()
        pipe.transformer.register_forward_hook(lambda module, args, output: None)
        assert torch.equal(case.latents(pipe), expected)


LONG = {"num_frames": 17, "overlap_history": 5}  # three loops
FORCED = [
    ("SkyReelsV2DiffusionForcingPipeline", {"ar_step": 1}, {}),
    (
        "SkyReelsV2DiffusionForcingPipeline",
        {"ar_step": 2, "causal_block_size": 2, "num_frames": 13, "base_num_frames": 13},
        {},
    ),
    ("SkyReelsV2DiffusionForcingPipeline", LONG, {}),
    ("SkyReelsV2DiffusionForcingPipeline", {"fps": 24}, {"inject_sample_info": True}),
    ("SkyReelsV2DiffusionForcingImageToVideoPipeline", {"last_image": picture(1)}, {}),
    ("SkyReelsV2DiffusionForcingVideoToVideoPipeline", {"num_frames": 17, "ar_step": 2}, {}),
]


@pytest.mark.parametrize(
    ("name", "arguments", "config"), FORCED, ids=lambda value: "+".join(value) if isinstance(value, dict) else value
)
def test_frames_of_different_noise_levels(name, arguments, config):
    case = BY_NAME[name]
    pipe = build(type(case.build()), unipc, kind=SkyReelsV2Transformer3DModel, **config)
    actual, expected = both_ways(case, pipe=pipe, **arguments)
    assert actual.shape[2] >= 3
    assert relative_error(actual, expected) <= FP32_RELATIVE


def test_a_schedule_needs_one_noise_level_per_step():
    case = BY_NAME["SkyReelsV2DiffusionForcingPipeline"]
    pipe = case.build()
    config = STGConfig(schedule=STGSchedule((ScheduleEntry(0.0, (1,), 1.5),), "at_or_below"))
    with stg_engine.attach(pipe, config):
        assert case.latents(pipe).isfinite().all()
        with pytest.raises(ValueError, match="5 steps for 3 sigmas"):
            case.latents(pipe, ar_step=1)
