"""CogVideoX: dynamic CFG in its pipelines, and what is special in the model."""

import math

import pytest
import torch
from models.case import relative_error
from models.families.cogvideox import FRAMES, inputs, model, skipped
from models.pipelines.cogvideox import CASES

import stg_engine
from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.hooks import hook_of

FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
SKIPS = (Skip((2,), 1.5), Skip((1, 3), 0.5, "attention"))
CONFIG = STGConfig(layers=(2,), scale=1.5, extra_skips=SKIPS[1:])


def guided_apart(pipe, steps):
    """Make the transformer of a pipeline with `use_dynamic_cfg` and scale 3 answer every row with the guided
    prediction, of plain calls, and of g as the pipeline computes it behind the call."""
    transformer = pipe.transformer
    plain = transformer.forward

    def forward(**arguments):
        progress = (steps - arguments["timestep"][0].item()) / steps
        scale = 1 + 3.0 * (1 - math.cos(math.pi * progress**5.0)) / 2
        u, c = plain(**arguments)[0].chunk(2)
        guided = u + scale * (c - u)
        for skip in SKIPS:
            with skipped(transformer, skip):
                guided = guided + skip.scale * (c - plain(**arguments)[0].chunk(2)[1])
        return (torch.cat([guided, guided]),)

    transformer.forward = forward


@pytest.mark.parametrize(("videos", "execution"), [(1, "batched"), (2, "serial")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dynamic_cfg(case, videos, execution):
    steps, arguments = 3, {"use_dynamic_cfg": True}
    if "strength" in case.call:  # the last 2 of 4 steps
        steps, arguments = 2, {**arguments, "strength": 0.7, "num_inference_steps": 4}
    reference, pipe = case.build(), case.build()
    guided_apart(reference, steps)
    expected = case.latents(reference, videos, **arguments)
    with stg_engine.attach(pipe, CONFIG, execution=execution) as engine:
        actual = case.latents(pipe, videos, **arguments)
    assert engine.report().guided_steps == steps
    assert relative_error(actual, expected) <= 10 * FP32_RELATIVE  # of latents: times the scales, over three steps


def test_dynamic_cfg_does_nothing_without_a_negative_prompt():
    case = CASES[0]
    pipe = case.build()
    with stg_engine.attach(pipe, CONFIG):
        expected = case.latents(pipe, 2, guided=False)
        assert torch.equal(case.latents(pipe, 2, guided=False, use_dynamic_cfg=True), expected)


def test_rescale_needs_the_guidance_scale_which_the_pipelines_set_behind_the_call():
    case = CASES[0]
    pipe = case.build()
    with stg_engine.attach(pipe, STGConfig(layers=(2,), rescale=0.7)):
        with pytest.raises(ValueError, match="rescale"):
            case.latents(pipe)
        assert case.latents(pipe, guided=False).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("execution", ["batched", "serial"])
def test_modules_outside_the_blocks_run_once_for_what_is_equal(execution):
    transformer, videos, steps, rows = model("CogVideoX-2B", torch.float32), 2, 2, 4 * 2  # 4 branches
    shared, cond, uncond = inputs("CogVideoX-2B", videos, torch.float32)
    expected = {
        "time_embedding": (1, videos * steps),  # entries of a row, rows
        "patch_embed.proj": (FRAMES, videos * steps),
        "patch_embed.text_proj": (1, rows),
        "norm_final": (1, rows * steps),
        "norm_out": (1, rows * steps),
        "proj_out": (1, rows * steps),
    }
    seen = {name: [] for name in expected}
    with Denoiser(transformer, CONFIG, execution=execution, kernels="off") as denoiser:
        assert denoiser.plans().forks["uncond"].block == -1
        for name, sizes in seen.items():
            below = hook_of(transformer.get_submodule(name)).fn_ref

            def spy(*args, sizes=sizes, inner=below.original_forward, **kwargs):
                sizes.append(len(args[0]))
                return inner(*args, **kwargs)

            below.original_forward = spy
        for _ in range(steps):
            denoiser.branches(shared, cond, uncond)
    for name, (entries, count) in expected.items():
        assert sum(seen[name]) == entries * count, name
        if execution == "serial":
            assert set(seen[name]) == {entries}, name


@torch.no_grad()
@pytest.mark.parametrize("skip", SKIPS, ids=lambda skip: skip.mode)
def test_fused_projections(skip):
    transformer = model("CogVideoX-5B", torch.float32)
    transformer.fuse_qkv_projections()
    shared, cond, _ = inputs("CogVideoX-5B", 1, torch.float32)
    with skipped(transformer, skip):
        (expected,) = transformer(**shared, **cond, return_dict=False)
    config = STGConfig(layers=skip.layers, mode=skip.mode)
    with Denoiser(transformer, config, kernels="off") as denoiser:
        actual = denoiser.branches(shared, cond)["skip"]
    assert relative_error(actual, expected) <= FP32_RELATIVE
