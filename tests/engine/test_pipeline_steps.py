"""Which guidance each step of a pipeline's loop gets: windows, schedules, and calls that are not steps."""

import numpy as np
import pytest
import torch
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline, LTXPipeline, UniPCMultistepScheduler
from engine.tiny import latents_of, on_step, tiny_pipeline
from PIL import Image

import stg_engine
from stg_engine import ScheduleEntry, STGConfig, STGSchedule
from stg_engine.reference import three_passes

CONFIG = STGConfig(layers=(2,), scale=1.5)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def test_window():
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, STGConfig(layers=(2,), start=0.25, stop=0.75)) as engine:
        latents_of(pipe, num_inference_steps=8)
        report = engine.report()
    assert (report.steps, report.guided_steps) == (8, 4)


def test_schedule_sets_scale_layers_and_guidance_per_sigma():
    entries = (
        ScheduleEntry(0.99, guidance_scale=1.0),
        ScheduleEntry(0.5, (1,), 2.0, 0.5, 4.0),
        ScheduleEntry(0.1, (3,), 1.0),
    )
    pipe = tiny_pipeline()
    rows = []
    with stg_engine.attach(pipe, STGConfig(schedule=STGSchedule(entries, "at_or_below"))) as engine:
        pipe.transformer.transformer_blocks[3].ff.register_forward_pre_hook(
            lambda module, args: rows.append(len(args[0]))
        )
        latents_of(pipe, num_inference_steps=4)
        sigmas = pipe.scheduler.sigmas[:-1].tolist()
        assert engine.report().guided_steps == 3
    expected = {0: 1, 1: 3, 2: 2}  # the last one: uncond and cond by the call's scale 3, the skip is passed through
    index = [next((i for i, entry in enumerate(entries) if entry.sigma <= sigma), 2) for sigma in sigmas]
    assert rows[:4] == [expected[i] for i in index]
    assert set(index) == {0, 1, 2}


CONVENTIONS = {
    "x0": STGConfig(layers=(2,), scale=1.5, rescale=0.7, space="x0"),
    "zero_init": STGConfig(layers=(2,), scale=1.5, zero_init=0.95),
    "negative_prompt": STGConfig(layers=(2,), scale=1.5, weak_pass="negative_prompt"),
    "uncond": STGConfig(layers=(2,), weak_pass="uncond"),
    "rescale_cfg": STGConfig(layers=(2,), scale=1.5, rescale=0.7, rescale_cfg=True, stop=0.5),
}


@pytest.mark.parametrize("kind", [LTXPipeline, LTXImageToVideoPipeline], ids=["t_per_video", "t_per_token"])
@pytest.mark.parametrize("config", CONVENTIONS.values(), ids=CONVENTIONS)
def test_conventions(config, kind):
    """The pipeline's steps with `three_passes` in the transformer's place."""
    pipe, call = tiny_pipeline(kind), {"num_inference_steps": 4}
    if kind is LTXImageToVideoPipeline:
        call["image"] = PICTURE
    plain = latents_of(pipe, **call)
    with stg_engine.attach(pipe, config):
        actual = latents_of(pipe, **call)
    model, steps = pipe.transformer, iter(range(4))
    inner = model.forward

    def forward(**arguments):
        model.forward = inner
        names = ("encoder_hidden_states", "encoder_attention_mask")
        shared = {k: v[:1] if k in ("hidden_states", "timestep") else v for k, v in arguments.items() if k not in names}
        uncond, cond = ({name: arguments[name][row : row + 1] for name in names} for row in (0, 1))
        i = next(steps)
        sigma = pipe.scheduler.sigmas[i].item()
        tokens = shared["timestep"] / 1000 if shared["timestep"].ndim == 2 else None
        shared.pop("return_dict")
        guided = three_passes(
            model, config, shared, cond, uncond, 3.0, progress=i / 4, sigma=sigma, token_sigmas=tokens
        )
        model.forward = forward
        return (guided.repeat(2, 1, 1),)

    model.forward = forward
    expected = latents_of(pipe, **call)
    assert (actual - expected).norm() <= 2e-5 * expected.norm()
    assert (plain - expected).norm() > 1e-3 * expected.norm()


def test_a_weak_pass_that_needs_cfg_is_refused_before_the_first_step_without_it():
    pipe = tiny_pipeline()
    with (
        stg_engine.attach(pipe, CONVENTIONS["negative_prompt"]),
        pytest.raises(ValueError, match="weak_pass='negative_prompt' acts through CFG"),
    ):
        latents_of(pipe, guidance_scale=1.0)


def scheduled(*entries):
    return STGConfig(schedule=STGSchedule(entries, "at_or_below"))


LATE = scheduled(ScheduleEntry(0.5), ScheduleEntry(0.1, (1,), 1.0, 0.5, 4.0))


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (
            STGConfig(layers=(2,), rescale=0.5),
            {"guidance_rescale": 0.7},
            "guidance_rescale=0.7 and rescale=0.5 are the",
        ),
        (LATE, {"guidance_rescale": 0.7}, "guidance_rescale=0.7 and rescale=0.5 are the"),
        (LATE, {"guidance_scale": 1.0}, "guidance_scale=4.0 in the schedule needs the negative prompt"),
    ],
)
def test_settings_that_contradict_are_refused_before_the_first_step(config, arguments, message):
    pipe = tiny_pipeline()
    calls = []
    pipe.transformer.proj_in.register_forward_pre_hook(lambda *_: calls.append(1))
    with stg_engine.attach(pipe, config), pytest.raises(ValueError, match=message):
        latents_of(pipe, num_inference_steps=8, **arguments)
    assert not calls


def test_guidance_rescale_without_uncond_does_nothing_as_in_diffusers():
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG):
        with_it = latents_of(pipe, guidance_scale=1.0, guidance_rescale=0.7)
        without = latents_of(pipe, guidance_scale=1.0)
    assert torch.equal(with_it, without)


def rows_of_the_last_block(pipe):
    rows = []
    pipe.transformer.transformer_blocks[3].ff.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


def test_schedule_follows_sigmas_that_timesteps_round():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = tiny_pipeline(scheduler=scheduler)
    latents_of(pipe)
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert int(sigmas[1] * 1000) / 1000 < sigmas[1], "the case must have a sigma that its timestep rounds down"
    rows = rows_of_the_last_block(pipe)
    with stg_engine.attach(pipe, scheduled(ScheduleEntry(sigmas[1], (1,), 1.0), ScheduleEntry(0.0))):
        latents_of(pipe)
    assert rows == [3, 3, 2]


def test_schedule_and_window_of_a_call_that_begins_late():
    """With strength below 1 the loop runs the last of the scheduler's steps."""
    pipe = tiny_pipeline(LTXConditionPipeline)
    rows = rows_of_the_last_block(pipe)
    call = {"num_inference_steps": 8, "denoise_strength": 0.5, "latents": torch.zeros(1, 8, 3, 8, 8), "image": PICTURE}
    latents_of(pipe, **call)
    sigmas = pipe.scheduler.sigmas[-5:-1].tolist()
    rows.clear()
    by_sigma = scheduled(ScheduleEntry(sigmas[1]), ScheduleEntry(0.0, (1,), 1.0))
    for config in (by_sigma, STGConfig(layers=(1,), start=0.5)):
        with stg_engine.attach(pipe, config) as engine:
            latents_of(pipe, **call)
        assert engine.report().steps == pipe.num_timesteps == 4
        assert rows == [2, 2, 3, 3]
        rows.clear()


def test_the_transformer_called_after_the_pipeline_is_an_error():
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG):
        latents_of(pipe)
        with pytest.raises(RuntimeError, match="outside the denoising loop of the LTXPipeline"):
            pipe.transformer(hidden_states=torch.zeros(1, 1, 8))


def test_a_transformer_call_from_a_callback_is_an_error():
    def call(pipe, index, tensors):
        pipe.transformer(hidden_states=torch.zeros(1, 1, 8))

    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG), pytest.raises(RuntimeError, match="more often than once in a step"):
        latents_of(pipe, **on_step(call))


def test_a_scale_changed_into_a_contradiction_is_an_error_in_its_step():
    def cut(pipe, index, tensors):
        pipe._guidance_scale = 1.0
        return {**tensors, "prompt_embeds": tensors["prompt_embeds"][-1:]}

    pipe = tiny_pipeline()
    config = scheduled(ScheduleEntry(0.9), ScheduleEntry(0.0, (1,), 1.0, guidance_scale=4.0))
    with stg_engine.attach(pipe, config), pytest.raises(ValueError, match="needs the negative prompt"):
        latents_of(pipe, **on_step(cut))


def test_the_transformer_may_be_called_alone_where_nothing_is_skipped():
    pipe = tiny_pipeline()
    rows = rows_of_the_last_block(pipe)
    call = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: call.update(k), with_kwargs=True)
    latents_of(pipe)
    hook.remove()
    with stg_engine.attach(pipe, STGConfig(layers=(1,), scale=0.0)), torch.no_grad():
        pipe.transformer(**call)
    assert rows == [2] * 4


def test_a_schedule_that_sets_the_guidance_scale_says_so():
    pipe = tiny_pipeline()
    with stg_engine.attach(
        pipe, scheduled(ScheduleEntry(0.9, (1,), 1.0, guidance_scale=4.0), ScheduleEntry(0.0))
    ) as engine:
        latents_of(pipe, guidance_scale=2.0)
        assert "guidance scales 4 are the schedule's; the call's 2 is used in 2 of 3 steps" in str(engine.report())
