"""Stable Video Diffusion: what runs between the blocks, cross-attention to one key, the latents in the prompt."""

import inspect

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from models.case import relative_error
from models.families import svd

from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.models import spec_of

FRAMES, VIDEOS = 3, 2
LAST = STGConfig(layers=(2,), mode="attention", axis="spatial")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def unet():
    return svd.model(torch.float32)


@pytest.fixture
def inputs():
    return svd.inputs(VIDEOS, torch.float32)


def record(modules):
    """Branches' worth of rows that each call of `modules` gets, once a Denoiser's hooks are above."""
    rows = []
    for module in modules:

        def spied(x, *args, inner=module.forward, **kwargs):
            rows.append(len(x) / (FRAMES * VIDEOS))
            return inner(x, *args, **kwargs)

        module.forward = spied
    return rows


def at(unet, *paths):
    return [unet.get_submodule(path) for path in paths]


def cross_attentions(unet):
    return [block.attn2 for layer in svd.layers_of(unet) for block in layer]


def test_resnets_run_on_the_rows_that_differ(unet, inputs):
    stages = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    rows = record([resnet for stage in stages for resnet in stage.resnets])
    with Denoiser(unet, LAST, kernels="off") as denoiser:
        denoiser.branches(*inputs)
    assert rows == [2] * 7 + [3]  # 8 resnets; the last one alone comes after layer 2


@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("conv_in", 2),
        ("down_blocks.0.downsamplers.0", 2),
        ("up_blocks.0.upsamplers.0", 2),
        ("up_blocks.1.attentions.0.proj_in", 2),
        ("down_blocks.0.attentions.0.proj_out", 2),
        ("up_blocks.1.attentions.0.norm", 2),
        ("up_blocks.1.attentions.1.time_pos_embed", 1),
        ("conv_out", 3),
    ],
)
def test_other_modules_run_on_the_rows_that_differ(unet, inputs, path, rows):
    seen = record(at(unet, path))
    with Denoiser(unet, LAST, kernels="off") as denoiser:
        denoiser.branches(*inputs)
    assert seen == [rows]


@pytest.mark.parametrize("path", ["conv_norm_out", "conv_out"])
def test_serial_runs_the_last_modules_row_by_row(unet, inputs, path):
    seen = record(at(unet, path))
    with Denoiser(unet, LAST, execution="serial", kernels="off") as denoiser:
        denoiser.branches(*inputs)
    assert seen == [1 / VIDEOS] * 3 * VIDEOS


def test_embeddings_of_time_run_once(unet, inputs):
    seen = record(at(unet, "time_embedding", "add_embedding"))
    with Denoiser(unet, LAST, kernels="off") as denoiser:
        denoiser.branches(*inputs)
    assert seen == [1 / FRAMES] * 2  # one entry per video


def test_one_key_is_attended_once_per_prompt(unet, inputs):
    attentions = cross_attentions(unet)
    queries = record([projection for a in attentions for projection in (a.to_q, a.to_k)])
    values = record([a.to_v for a in attentions])
    shared, cond, uncond = inputs
    with Denoiser(unet, LAST, kernels="off") as denoiser:
        for step in range(3):
            prompts = [{**prompt, "sample": prompt["sample"] + step} for prompt in (cond, uncond)]
            denoiser.branches({**shared, "timestep": shared["timestep"] - step}, *prompts)
        assert queries == []
        assert values == [2 / FRAMES] * 4 + [3 / FRAMES] * 4  # one token per video; skip has rows from layer 2 on
        attentions[0].to_v.weight.mul_(2)
        actual = denoiser.branches(*inputs)
        assert len(values) == 16
    expected = unet(**shared, **cond, return_dict=False)[0]
    assert relative_error(actual["cond"], expected) < 2e-6


class OtherProcessor(AttnProcessor2_0):
    """Stands for one that does more than attend."""


@pytest.mark.parametrize("reason", ["serial", "processor", "two tokens"])
def test_the_module_attends_where_one_key_is_not_all(unet, inputs, reason):
    shared, cond, uncond = inputs
    if reason == "processor":
        for attention in cross_attentions(unet):
            attention.set_processor(OtherProcessor())
    if reason == "two tokens":
        for prompt in (cond, uncond):
            prompt["encoder_hidden_states"] = torch.randn(VIDEOS, 2, 8)
    queries = record([attention.to_q for attention in cross_attentions(unet)])
    with Denoiser(unet, LAST, execution="serial" if reason == "serial" else "batched", kernels="off") as denoiser:
        actual = denoiser.branches(shared, cond, uncond)
        assert queries
    assert relative_error(actual["uncond"], unet(**shared, **uncond, return_dict=False)[0]) < 2e-6


@pytest.mark.parametrize("timestep", [1.2, torch.tensor(1.2)], ids=["number", "scalar"])
@pytest.mark.parametrize("execution", ["batched", "serial"])
def test_timestep_may_be_one_number(unet, inputs, timestep, execution):
    shared, cond, uncond = inputs
    with Denoiser(unet, LAST, execution=execution, kernels="off") as denoiser:
        expected = denoiser.branches(shared, cond, uncond)
        actual = denoiser.branches({**shared, "timestep": timestep}, cond, uncond)
    for name in expected:
        assert torch.equal(actual[name], expected[name])


def test_nothing_is_kept_of_the_latents(unet, inputs):
    shared, cond, uncond = inputs
    with Denoiser(unet, LAST, kernels="off") as denoiser:
        counts = []
        for _ in range(3):
            fresh = [{**prompt, "sample": prompt["sample"].clone()} for prompt in (cond, uncond)]
            denoiser.branches(shared, *fresh)
            counts.append(len(denoiser.memo))
    assert counts[0] > 0
    assert len(set(counts)) == 1


def test_latents_belong_to_the_prompt(unet, inputs):
    shared, cond, uncond = inputs
    with Denoiser(unet, LAST, kernels="off") as denoiser:
        with pytest.raises(ValueError, match=r"shared holds 'sample'; it belongs in cond and uncond"):
            denoiser.branches({**shared, "sample": cond["sample"]}, cond, uncond)
        with pytest.raises(ValueError, match=r"cond holds .*; it must hold 'sample'"):
            denoiser.branches(shared, {"encoder_hidden_states": cond["encoder_hidden_states"]})
        with pytest.raises(ValueError, match=r"cond\['encoder_hidden_states'\] has 1 rows; sample has 2"):
            denoiser.branches(shared, {**cond, "encoder_hidden_states": torch.randn(1, 1, 8)})


def test_published_guidance(unet, inputs):
    """STG-A of one layer, spatial and temporal: arXiv 2411.18664 Eq. 20."""
    skips = (Skip((2,), 2.0, "attention", "spatial"), Skip((2,), 0.5, "attention", "temporal"))
    config = STGConfig(layers=(2,), scale=2.0, mode="attention", axis="spatial", extra_skips=skips[1:])
    with Denoiser(unet, config, kernels="off") as denoiser:
        guided = denoiser(*inputs, guidance_scale=3.0)
    shared, cond, uncond = inputs
    c, u = (unet(**shared, **prompt, return_dict=False)[0] for prompt in (cond, uncond))
    expected = u + 3 * (c - u)
    for skip in skips:
        with svd.skipped(unet, skip):
            expected += skip.scale * (c - unet(**shared, **cond, return_dict=False)[0])
    assert relative_error(guided, expected) < 1e-5


def test_layers_of_the_published_unet():
    defaults = inspect.signature(UNetSpatioTemporalConditionModel.__init__).parameters
    config = {name: parameter.default for name, parameter in defaults.items()}
    assert spec_of("UNetSpatioTemporalConditionModel").num_layers(config) == 16


@pytest.mark.parametrize("changes", [{}, {"layers_per_block": [2, 1], "transformer_layers_per_block": [1, 3]}], ids=str)
def test_layers_in_the_config(unet, changes):
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")} | changes
    spec, other = spec_of(unet), UNetSpatioTemporalConditionModel(**config)
    assert spec.num_layers(config) == len(spec.block_list(other)) // 2
