"""HunyuanVideo's pipelines: guidance distilled into the model, and true CFG, which only their own call knows of."""

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from models.case import relative_error
from models.pipeline_case import passes_apart
from models.pipelines.hunyuan_video import CASES

import stg_engine
from stg_engine import Skip, STGConfig
from stg_engine.config import ScheduleEntry, STGSchedule

FP32_RELATIVE = 2e-5  # of latents after three steps
TEXT, UNEQUAL = CASES[:2]
CONFIG = STGConfig(layers=(1, 2), scale=1.5)
SCALES = pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0], ids=["distilled", "true_cfg"])


def own_loop(pipe, case, config, true_cfg_scale, videos, rescale=0.0):
    """Text to video written out: embeddings in, two or three calls a step, Euler."""
    prompts, model = case.prompts(videos), pipe.transformer
    generators = [torch.Generator().manual_seed(i) for i in range(videos)]
    latents = pipe.prepare_latents(videos, 4, 16, 16, 9, torch.float32, torch.device("cpu"), generators)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 4)[:-1])
    for t in pipe.scheduler.timesteps:

        def call(prefix, latents=latents, t=t):
            return model(
                latents,
                t.expand(videos),
                prompts[f"{prefix}prompt_embeds"],
                prompts[f"{prefix}prompt_attention_mask"],
                prompts[f"{prefix}pooled_prompt_embeds"],
                guidance=torch.full((videos,), 6000.0),
                return_dict=False,
            )[0]

        c = guided = call("")
        if true_cfg_scale > 1:
            u = call("negative_")
            guided = u + true_cfg_scale * (c - u)
        with case.case.skipped(model, Skip(config.layers, mode=config.mode)):
            guided = guided + config.scale * (c - call(""))
        ratio = c.flatten(1).std(1) / guided.flatten(1).std(1)
        guided = guided * (rescale * ratio + 1 - rescale)[:, None, None, None, None]
        latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


@SCALES
@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("case", [TEXT, UNEQUAL], ids=str)
@torch.no_grad()
def test_equals_a_loop_of_single_calls(case, videos, true_cfg_scale):
    pipe = case.build()
    expected = own_loop(pipe, case, CONFIG, true_cfg_scale, videos)
    with stg_engine.attach(pipe, CONFIG):
        actual = case.latents(pipe, videos, true_cfg_scale=true_cfg_scale)
    assert relative_error(actual, expected) <= FP32_RELATIVE


@torch.no_grad()
def test_rescale_needs_the_distilled_model():
    pipe, config = TEXT.build(), STGConfig(layers=(1, 2), scale=1.5, rescale=0.7)
    expected = own_loop(pipe, TEXT, config, 1.0, 2, rescale=0.7)
    with stg_engine.attach(pipe, config):
        assert relative_error(TEXT.latents(pipe, 2, guided=False), expected) <= FP32_RELATIVE
        with pytest.raises(ValueError, match="needs the guidance scale"):
            TEXT.latents(pipe, 2)


@SCALES
@pytest.mark.parametrize("weak_pass", ["negative_prompt", "uncond"])
def test_a_weak_pass_that_needs_cfg_is_refused(weak_pass, true_cfg_scale):
    pipe = TEXT.build()
    with (
        stg_engine.attach(pipe, STGConfig(layers=(1,), weak_pass=weak_pass)),
        pytest.raises(ValueError, match=f"weak_pass='{weak_pass}' is not allowed with HunyuanVideoPipeline"),
    ):
        TEXT.latents(pipe, true_cfg_scale=true_cfg_scale)


def test_every_call_finds_out_anew_whether_there_is_true_cfg():
    pipe = TEXT.build()
    with stg_engine.attach(pipe, CONFIG) as engine:
        calls = [(TEXT.latents(pipe, guided=guided), str(engine.plan)) for guided in (True, False, True, False)]
    for (latents, plan), (again, same_plan) in zip(calls[:2], calls[2:], strict=True):
        assert torch.equal(latents, again)
        assert plan == same_plan
    assert ["uncond" in plan for _, plan in calls[:2]] == [True, False]


@SCALES
@pytest.mark.parametrize("last", [0, 1])
def test_interrupt(last, true_cfg_scale):
    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == last
        return {}

    pipe, arguments = TEXT.build(), {"true_cfg_scale": true_cfg_scale, "callback_on_step_end": stop}
    with passes_apart(pipe, TEXT, CONFIG.skips, guided=true_cfg_scale > 1):
        expected = TEXT.latents(pipe, **arguments)
    with stg_engine.attach(pipe, CONFIG) as engine:
        actual = TEXT.latents(pipe, **arguments)
        assert engine.report().steps == engine.report().guided_steps == last + 1
    assert relative_error(actual, expected) <= FP32_RELATIVE


@SCALES
def test_a_callback_may_replace_latents_and_prompt(true_cfg_scale):
    def change(pipe, index, timestep, tensors):
        return {"latents": 0.5 * tensors["latents"], "prompt_embeds": -tensors["prompt_embeds"]}

    arguments = {
        "true_cfg_scale": true_cfg_scale,
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    pipe = TEXT.build()
    unchanged = TEXT.latents(pipe, true_cfg_scale=true_cfg_scale)
    with passes_apart(pipe, TEXT, CONFIG.skips, guided=true_cfg_scale > 1):
        expected = TEXT.latents(pipe, **arguments)
    with stg_engine.attach(pipe, CONFIG):
        actual = TEXT.latents(pipe, **arguments)
    assert relative_error(actual, expected) <= FP32_RELATIVE
    assert relative_error(unchanged, expected) > 0.1


@torch.no_grad()
def test_a_schedule_without_cfg_has_none_in_the_first_step_either():
    pipe = TEXT.build()
    schedule = STGSchedule((ScheduleEntry(1.0, (1, 2), 1.5, 0.0, 1.0),), rule="at_or_below")
    with stg_engine.attach(pipe, STGConfig(schedule=schedule)):
        actual = TEXT.latents(pipe)
    assert relative_error(actual, own_loop(pipe, TEXT, CONFIG, 1.0, 1)) <= FP32_RELATIVE


def test_attention_kwargs_that_offloading_copies():
    pipe = TEXT.build()
    with stg_engine.attach(pipe, CONFIG):
        expected = TEXT.latents(pipe)
        add_hook_to_module(pipe.transformer, AlignDevicesHook("cpu"))
        assert torch.equal(TEXT.latents(pipe, attention_kwargs={"note": 1.0}), expected)
        remove_hook_from_module(pipe.transformer)
