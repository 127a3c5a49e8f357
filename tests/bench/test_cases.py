"""The registry of cases: published sizes, inputs as pipelines give them, versions for a CPU that can be measured."""

import copy
from contextlib import nullcontext
from functools import cache
from unittest import mock

import pytest
import torch
from diffusers import AutoModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import SHAPES
from stg_engine import Denoiser
from stg_engine.bench.cases import CASES, MODELS, find
from stg_engine.models import spec_of
from stg_engine.reference import three_passes

CPU = torch.device("cpu")

# Parameters in billions as published: model cards and reports (LTX-Video, LTX-2, Mochi 1, CogVideoX, HunyuanVideo,
# Wan 2.1), of the transformer alone; rounded there, hence a range.
BILLIONS = {
    "ltx-video-2b": (1.9, 2.0),
    "ltx-video-13b": (12.9, 13.1),
    "ltx-2": (18.5, 19.5),
    "mochi": (9.9, 10.1),
    "cogvideox-2b": (1.6, 2.0),
    "cogvideox-5b": (5.0, 5.6),
    "hunyuan-video": (12.5, 13.5),
    "wan-2.1-1.3b": (1.3, 1.5),
    "wan-2.1-14b": (13.9, 14.4),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tensors(inputs):
    """{(group, name, place): tensor} of (shared, cond, uncond)."""
    return {
        (group, name, place): value
        for group, arguments in enumerate(inputs)
        for name, entry in (arguments or {}).items()
        for place, value in enumerate(entry if isinstance(entry, tuple) else (entry,))
        if isinstance(value, torch.Tensor)
    }


def widened(inputs):
    return tuple(
        arguments
        and {
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in arguments.items()
        }
        for arguments in inputs
    )


def is_same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


@cache
def on_meta(case):
    with torch.device("meta"):
        return case.build()


def first_block_input(case, model):
    """Shape of the video stream that enters the blocks, on a device without memory."""

    class Seen(Exception):
        pass

    def stop(block, args, kwargs):
        raise Seen((args[0] if args else kwargs["hidden_states"]).shape)

    shared, cond, _ = case.inputs(torch.device("meta"), torch.float32)
    hook = spec_of(model).block_list(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    # Mochi asks for autocast, which knows no "meta".
    with pytest.raises(Seen) as seen, mock.patch("torch.autocast", return_value=nullcontext()):
        model(**shared, **cond)
    hook.remove()
    return seen.value.args[0]


@pytest.mark.parametrize("case", find("true"), ids=str)
def test_true_cases_have_the_published_size(case):
    model = on_meta(case)
    low, high = next(size for name, size in BILLIONS.items() if case.name in (name, f"{name}-1216x704"))
    assert low <= sum(parameter.numel() for parameter in model.parameters()) / 1e9 <= high
    spec = spec_of(model)
    blocks = len(spec.block_list(model))
    assert blocks in spec.presets
    assert max(layer for skip in case.config.skips for layer in skip.layers) < blocks


@pytest.mark.parametrize("case", find("all"), ids=str)
def test_tokens_that_enter_the_blocks(case):
    model = on_meta(case)
    config = model.config
    channels = config.num_attention_heads * config.attention_head_dim
    assert first_block_input(case, model) == (1, case.tokens, channels)
    assert case.kind != "small" or case.tokens <= 512
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_cpu_version_has_the_structure(model):
    true, cpu = (on_meta(CASES[name]) for name in (model.name, f"{model.name}-cpu"))
    spec = spec_of(true)
    depths, ratios = [], []
    for transformer, case in ((true, CASES[model.name]), (cpu, CASES[f"{model.name}-cpu"])):
        blocks = spec.block_list(transformer)
        depths.append(case.config.layers[0] / len(blocks))
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        weights = sum(parameter.numel() for parameter in blocks[0].parameters() if parameter.ndim > 1)
        ratios.append(weights / width**2)
    blocks = spec.block_list(cpu)
    assert len(blocks) >= 8
    assert [type(block) for block in blocks[:: len(blocks) - 1]] == [
        type(block) for block in spec.block_list(true)[:: len(spec.block_list(true)) - 1]
    ]
    assert abs(depths[0] - depths[1]) < 1 / len(blocks)
    assert cpu.config.attention_head_dim == true.config.attention_head_dim
    # Modulation has a width of its own (CogVideoX), and audio and text have streams of theirs.
    assert ratios[1] == pytest.approx(ratios[0], rel=0.25)


@pytest.mark.parametrize("case", find(("cpu", "small")), ids=str)
def test_inputs_are_the_same_in_every_call(case):
    first = tensors(case.inputs(CPU, torch.float32))
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    try:
        assert is_same(tensors(case.inputs(CPU, torch.float32)), first)
    finally:
        torch.set_default_dtype(torch.float32)
    shared, cond, uncond = case.inputs(CPU, torch.bfloat16)
    assert {**shared, **cond}[spec_of(on_meta(case)).latents[0]].dtype == torch.bfloat16
    assert (uncond is None) == (case.guidance_scale is None)
    assert uncond is None or not torch.equal(cond["encoder_hidden_states"], uncond["encoder_hidden_states"])


@pytest.mark.parametrize("case", find("cpu"), ids=str)
def test_guided_step_of_a_cpu_case(case):
    """The engine within twice the rounding of plain passes, both against float64; the skip far above it.

    The passes cost about 12 GFLOP, almost all of it in the blocks.
    """
    model, inputs = case.build(), case.inputs(CPU, torch.float32)
    constant = [name for name, weight in model.named_parameters() if weight.numel() > 1 and weight.std() == 0]
    assert not constant
    arguments = (case.config, *inputs, case.guidance_scale)
    with FlopCounterMode(display=False) as counter:
        plain = outputs(three_passes(model, *arguments, one_batch=True))
    blocks = [name for name, module in model.named_modules() if module in spec_of(model).block_list(model)]
    counts = {name.partition(".")[2]: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    assert 10e9 < counter.get_total_flops() < 16e9
    assert sum(counts[name] for name in blocks) > 0.99 * counter.get_total_flops()
    with Denoiser(model, case.config, kernels="off") as denoiser:
        guided = outputs(denoiser(*inputs, guidance_scale=case.guidance_scale))
        differences = denoiser.differences
    exact = outputs(
        three_passes(copy.deepcopy(model).double(), case.config, *widened(inputs), case.guidance_scale, one_batch=True)
    )
    assert len(guided) == len(exact)
    for mine, theirs, truth in zip(guided, plain, exact, strict=True):
        assert torch.isfinite(mine).all()
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm()
    rounding = (plain[0] - exact[0]).abs().max()
    assert min(differences.values()) > 1000 * rounding


def test_weights_are_the_same_in_every_build():
    first = CASES["cogvideox-2b-cpu"].build().state_dict()
    torch.manual_seed(7)
    assert is_same(CASES["cogvideox-2b-cpu"].build().state_dict(), first)


@pytest.mark.parametrize("name", ["wan-2.1-14b-cpu", "cogvideox-2b-cpu"])
def test_types_are_those_of_a_loaded_model(name, tmp_path):
    """float32 where diffusers keeps it, buffers too."""
    CASES[name].build().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = CASES[name].build()
    finally:
        torch.set_default_dtype(torch.float32)
    types = [
        {key: value.dtype for key, value in (*model.named_parameters(), *model.named_buffers())}
        for model in (built, loaded)
    ]
    assert types[0] == types[1]
    assert torch.bfloat16 in types[0].values()
    assert name != "wan-2.1-14b-cpu" or torch.float32 in types[0].values()


def test_shapes_of_the_kernel_benchmarks_are_those_of_the_cases():
    by_title = {case.title: case for case in find("true")}
    for shape in SHAPES:
        case = by_title[shape.model]
        config = on_meta(case).config
        _, cond, _ = case.inputs(torch.device("meta"), torch.float32)
        assert shape.tokens == case.tokens
        assert (shape.heads, shape.head_size) == (config.num_attention_heads, config.attention_head_dim)
        assert shape.text == cond["encoder_hidden_states"].shape[1]
    assert {shape.model for shape in SHAPES} >= {CASES[model.name].title for model in MODELS}


def test_find():
    assert len(CASES) == sum(len(model.cases()) for model in MODELS)
    assert [case.name for case in find(["mochi", "ltx-2-cpu", "mochi"])] == ["mochi", "ltx-2-cpu"]
    assert find("all") == list(CASES.values())
    for kind in ("true", "small", "cpu"):
        assert {case.kind for case in find(kind)} == {kind}
        assert len(find([kind])) >= len(MODELS)
    assert find(["mochi-cpu", "cpu"])[0].name == "mochi-cpu"
    with pytest.raises(ValueError, match=r"case='mochi-3' is not known; choose one of all, true, small, cpu, ltx-vi"):
        find(["mochi", "mochi-3"])
