"""Wan and SkyReels-V2: what runs once, image tokens, fused projections, weights kept in float32."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from models.case import relative_error
from models.families.wan import CASES, TOKENS

from stg_engine import Denoiser, STGConfig

BY_NAME = {case.name: case for case in CASES}
CONFIG = STGConfig(layers=(1,))
RELATIVE = 2e-6


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def spied(model, *paths):
    """{path: the first argument's shape in each call}, below the engine's hooks."""
    calls = {path: [] for path in paths}
    for path, shapes in calls.items():
        module = model.get_submodule(path)

        def spy(x, *args, inner=module.forward, shapes=shapes, **kwargs):
            shapes.append(tuple(x.shape))
            return inner(x, *args, **kwargs)

        module.forward = spy
    return calls


def assert_right(case, model, denoiser, inputs):
    actual = denoiser.branches(*inputs)
    denoiser.detach()
    for name, (expected,) in case.passes(model, denoiser.config.skips, *inputs).items():
        assert relative_error(actual[name], expected) <= RELATIVE, name


OF_TEXT = ("condition_embedder.text_embedder", "blocks.3.attn2.to_k", "blocks.3.attn2.norm_k", "blocks.3.attn2.to_v")
OF_IMAGE = (
    *("condition_embedder.image_embedder", "blocks.3.attn2.add_k_proj"),
    *("blocks.3.attn2.norm_added_k", "blocks.3.attn2.add_v_proj"),
)


@pytest.mark.parametrize("execution", ["batched", "serial"])
@pytest.mark.parametrize("name", ["Wan T2V", "Wan I2V", "Wan FLF2V", "SkyReels-V2 I2V"])
def test_prompt_and_image_are_projected_once(name, execution):
    case = BY_NAME[name]
    model = case.model(torch.float32)
    paths = OF_TEXT if name == "Wan T2V" else OF_TEXT + OF_IMAGE
    calls = spied(model, *paths, "blocks.3.attn2.to_q")
    shared, cond, uncond = case.inputs(1, torch.float32)
    rows = 3 if execution == "serial" else 1
    with Denoiser(model, CONFIG, execution=execution) as denoiser:
        for step in range(3):
            denoiser.branches({**shared, "timestep": shared["timestep"] - step}, cond, uncond)
        assert {path: len(calls[path]) for path in paths} == dict.fromkeys(paths, rows)
        assert len(calls["blocks.3.attn2.to_q"]) == 3 * rows


@pytest.mark.parametrize("change", ["replaced", "written"])
@pytest.mark.parametrize("name", ["encoder_hidden_states", "encoder_hidden_states_image"])
def test_another_image_or_text_is_noticed(name, change):
    case = BY_NAME["Wan I2V"]
    model = case.model(torch.float32)
    shared, cond, uncond = case.inputs(2, torch.float32)
    denoiser = Denoiser(model, CONFIG)
    denoiser.branches(shared, cond, uncond)
    if change == "written":
        cond[name].mul_(-2)
    else:
        cond[name] = cond[name] * -2
    assert_right(case, model, denoiser, (shared, cond, uncond))


ONCE = (
    "patch_embedding",
    *(f"condition_embedder.{n}" for n in ("timesteps_proj", "time_embedder", "act_fn", "time_proj")),
)


@pytest.mark.parametrize("name", ["Wan T2V", "Wan TI2V", "SkyReels-V2 T2V", "SkyReels-V2 DF"])
def test_latents_and_time_are_embedded_for_one_branch(name):
    case = BY_NAME[name]
    model = case.model(torch.float32)
    calls = spied(model, *ONCE)
    with Denoiser(model, CONFIG) as denoiser:
        denoiser.branches(*case.inputs(2, torch.float32))
    times = {"Wan TI2V": (TOKENS,), "SkyReels-V2 DF": (4,)}.get(name, ())
    flat = (2 * TOKENS,) if name == "Wan TI2V" else (2, *times)
    patches, *shapes = calls.values()
    assert shapes == [[flat], [(2, *times, 32)], [(2, *times, 24)], [(2, *times, 24)]]
    assert [shape[0] for shape in patches] == [2]


def test_timesteps_of_tokens_are_not_copied_for_the_branches():
    model = BY_NAME["Wan TI2V"].model(torch.float32)
    sizes = []

    def size(block, args):
        modulation = args[2]
        sizes.append(modulation.untyped_storage().nbytes() / modulation[:1].nbytes)

    with Denoiser(model, CONFIG) as denoiser:
        model.blocks[0].register_forward_pre_hook(size)
        denoiser.branches(*BY_NAME["Wan TI2V"].inputs(1, torch.float32))
    assert sizes == [1]


@pytest.mark.parametrize("mode", ["residual", "attention"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["Wan T2V", "Wan I2V", "SkyReels-V2 I2V"])
def test_fused_projections(name, when, mode):
    case = BY_NAME[name]
    model, inputs = case.model(torch.float32), case.inputs(2, torch.float32)
    config = STGConfig(layers=(1, 3), mode=mode)
    expected = case.passes(model, config.skips, *inputs)
    if when == "before":
        model.fuse_qkv_projections()
    with Denoiser(model, config) as denoiser:
        denoiser.branches(*inputs)
        model.fuse_qkv_projections()
        assert model.blocks[1].attn1.fused_projections
        for weight in (model.blocks[1].attn1.to_v.weight, model.blocks[1].attn2.to_v.weight):
            weight.zero_()  # nothing reads it any more
        for branch, tensor in denoiser.branches(*inputs).items():
            assert relative_error(tensor, expected[branch][0]) <= RELATIVE, branch


def test_fused_projections_of_the_prompt_run_once():
    case = BY_NAME["Wan I2V"]
    model, inputs = case.model(torch.float32), case.inputs(1, torch.float32)
    model.fuse_qkv_projections()
    paths = ["blocks.3.attn2.to_kv", "blocks.3.attn2.to_added_kv", "blocks.3.attn2.norm_k"]
    calls = spied(model, *paths)
    with Denoiser(model, CONFIG) as denoiser:
        for _ in range(3):
            denoiser.branches(*inputs)
    assert {path: len(shapes) for path, shapes in calls.items()} == dict.fromkeys(paths, 1)


def test_uncond_may_have_another_image():
    case = BY_NAME["Wan I2V"]
    model = case.model(torch.float32)
    shared, cond, uncond = case.inputs(2, torch.float32)
    image = uncond["encoder_hidden_states_image"]
    assert_right(
        case, model, Denoiser(model, CONFIG), (shared, cond, {**uncond, "encoder_hidden_states_image": -image})
    )


def test_image_tokens_of_the_wrong_number_of_videos_are_refused():
    case = BY_NAME["Wan I2V"]
    shared, cond, uncond = case.inputs(2, torch.float32)
    image = cond["encoder_hidden_states_image"][:1].repeat(3, 1, 1)
    with (
        Denoiser(case.model(torch.float32), CONFIG) as denoiser,
        pytest.raises(ValueError, match="encoder_hidden_states_image'] has 3 rows; hidden_states has 2"),
    ):
        denoiser.branches(shared, {**cond, "encoder_hidden_states_image": image}, uncond)


def test_half_cases_keep_in_float32_what_loading_keeps(tmp_path):
    case = BY_NAME["Wan FLF2V"]
    model = case.model(torch.bfloat16)
    case.model(torch.float32).save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert dtypes == {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    buffers = {name: (buffer.dtype, buffer.shape) for name, buffer in loaded.named_buffers()}
    assert buffers == {name: (buffer.dtype, buffer.shape) for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("name", ["Wan I2V", "SkyReels-V2 I2V"])
def test_max_rows_bounds_every_module(name):
    case = BY_NAME[name]
    model = case.model(torch.float32)
    leaves = [path for path, module in model.named_modules() if not list(module.children())]
    calls = spied(model, *leaves)
    with Denoiser(model, CONFIG, max_rows=1) as denoiser:
        denoiser.branches(*case.inputs(2, torch.float32))
    unbounded = {path for path, shapes in calls.items() if any(shape[0] > 1 for shape in shapes)}
    assert unbounded == {"rope", "norm_out"}  # the one has no rows, the other no sums over them
