"""Every branch of a guided forward equals its pass run alone."""

import inspect
from functools import partial

import pytest
import torch
from engine.tiny import tiny_inputs, tiny_transformer

from stg_engine import Denoiser as AnyDenoiser
from stg_engine import ScheduleEntry, Skip, STGConfig, STGSchedule
from stg_engine.reference import passes_in_one_batch, passes_one_by_one, three_passes

# The modules as they are, which plain passes run bit for bit; test_fused_blocks.py has the other half.
Denoiser = partial(AnyDenoiser, kernels="off")
FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
LAYERS = [(0,), (1,), (3,), (1, 2), (0, 3), (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def of_video(inputs, video):
    if inputs is None:
        return None
    return {k: v[video : video + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def video_by_video(transformer, config, shared, cond, uncond):
    """Each pass of each video as a call of its own."""
    videos = len(shared["hidden_states"])
    alone = [
        passes_one_by_one(transformer, config.skips, *(of_video(i, v) for i in (shared, cond, uncond)))
        for v in range(videos)
    ]
    return {name: torch.cat([branches[name] for branches in alone]) for name in alone[0]}


@pytest.mark.parametrize("with_uncond", [True, False], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("per_token", [False, True], ids=["t_per_video", "t_per_token"])
@pytest.mark.parametrize("videos", [1, 2, 3])
@pytest.mark.parametrize("mode", ["residual", "attention"])
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_branches_equal_passes_run_alone(transformer, layers, mode, videos, per_token, with_uncond):
    shared, cond, uncond = tiny_inputs(videos, per_token=per_token)
    uncond = uncond if with_uncond else None
    config = STGConfig(layers=layers, mode=mode)
    expected = passes_one_by_one(transformer, config.skips, shared, cond, uncond)
    with Denoiser(transformer, config) as denoiser:
        for _ in range(2):  # the second call takes prompt keys and values from the first
            actual = denoiser.branches(shared, cond, uncond)
            assert set(actual) == set(expected)
            for name in expected:
                assert relative_error(actual[name], expected[name]) <= FP32_RELATIVE, name
    assert relative_error(expected["skip"], expected["cond"]) > 100 * FP32_RELATIVE, "the skip changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("per_token", [False, True], ids=["t_per_video", "t_per_token"])
@pytest.mark.parametrize("videos", [1, 3])
@pytest.mark.parametrize("mode", ["residual", "attention"])
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_serial_is_bitwise_equal_to_passes_run_alone(layers, mode, videos, per_token, dtype):
    transformer = tiny_transformer(dtype=dtype)
    shared, cond, uncond = tiny_inputs(videos, per_token=per_token, dtype=dtype)
    config = STGConfig(layers=layers, mode=mode)
    expected = video_by_video(transformer, config, shared, cond, uncond)
    with Denoiser(transformer, config, execution="serial") as denoiser:
        for _ in range(2):
            actual = denoiser.branches(shared, cond, uncond)
            for name in expected:
                assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 100])
def test_max_rows_changes_no_branch(transformer, max_rows):
    shared, cond, uncond = tiny_inputs(3, per_token=True)
    config = STGConfig(layers=(1,), extra_skips=(Skip((0, 2), mode="attention"),))
    expected = passes_one_by_one(transformer, config.skips, shared, cond, uncond)
    rows = []
    spy = transformer.transformer_blocks[2].ff.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with Denoiser(transformer, config, max_rows=max_rows) as denoiser:
        actual = denoiser.branches(shared, cond, uncond)
    spy.remove()
    assert max(rows) == min(max_rows, 12)
    assert sum(rows) == 12
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= FP32_RELATIVE, name


SEVERAL = [
    (Skip((2,)), Skip((2,), mode="attention")),
    (Skip((1, 3)), Skip((1, 2)), Skip((1, 2, 3), mode="residual")),
    (Skip((0,)), Skip((0, 2), mode="attention"), Skip((3,))),
    (Skip((1,)), Skip((2,)), Skip((1, 2))),
]


@pytest.mark.parametrize("execution", ["batched", "serial"])
@pytest.mark.parametrize("skips", SEVERAL, ids=range(len(SEVERAL)))
def test_several_skip_branches(transformer, skips, execution):
    shared, cond, uncond = tiny_inputs(2)
    first = skips[0]
    config = STGConfig(layers=first.layers, mode=first.mode, extra_skips=skips[1:])
    expected = video_by_video(transformer, config, shared, cond, uncond)
    with Denoiser(transformer, config, execution=execution) as denoiser:
        actual = denoiser.branches(shared, cond, uncond)
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= (FP32_RELATIVE if execution == "batched" else 0), name


def test_only_the_planned_rows_are_computed(transformer):
    shared, cond, uncond = tiny_inputs(1)
    rows = {}
    spies = []
    for i, block in enumerate(transformer.transformer_blocks):
        for name in ("attn1.to_q", "ff"):
            spy = lambda module, args, key=(i, name): rows.__setitem__(key, len(args[0]))  # noqa: E731
            spies.append(block.get_submodule(name).register_forward_pre_hook(spy))
    with Denoiser(transformer, STGConfig(layers=(2,))) as denoiser:
        denoiser.branches(shared, cond, uncond)
        plan = denoiser.plans()
    for spy in spies:
        spy.remove()
    assert [rows[i, "ff"] for i in range(4)] == [len(names) for names in plan.rows] == [2, 2, 2, 3]
    assert [rows[i, "attn1.to_q"] for i in range(4)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    "settings", [{}, {"rescale": 0.7}, {"cfg_star": True}, {"rescale": 0.4, "rescale_over": "batch"}], ids=str
)
@pytest.mark.parametrize("with_uncond", [True, False], ids=["cfg", "no_cfg"])
def test_guided_prediction(transformer, settings, with_uncond):
    shared, cond, uncond = tiny_inputs(2)
    uncond = uncond if with_uncond else None
    config = STGConfig(layers=(1,), scale=1.5, extra_skips=(Skip((3,), 0.5, "attention"),), **settings)
    expected = three_passes(transformer, config, shared, cond, uncond, 4.0)
    with Denoiser(transformer, config) as denoiser:
        actual = denoiser(shared, cond, uncond, guidance_scale=4.0 if with_uncond else None)
    # The guidance scales multiply the error of the branches.
    assert relative_error(actual, expected) <= (4.0 + 2 * 1.5) * FP32_RELATIVE
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape


def test_bf16_is_within_the_error_of_the_plain_forward():
    exact_model, model = tiny_transformer(dtype=torch.float64), tiny_transformer(dtype=torch.bfloat16)
    for weight, rounded in zip(exact_model.parameters(), model.parameters(), strict=True):
        weight.data = rounded.data.double()
    shared, cond, uncond = tiny_inputs(3, per_token=True, dtype=torch.bfloat16)
    config = STGConfig(layers=(2,))
    double = [
        {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in i.items()}
        for i in (shared, cond, uncond)
    ]
    exact = passes_one_by_one(exact_model, config.skips, *double)
    plain = passes_one_by_one(model, config.skips, shared, cond, uncond)
    batched = passes_in_one_batch(model, config.skips, shared, cond, uncond)
    with Denoiser(model, config) as denoiser:
        engine = denoiser.branches(shared, cond, uncond)
    for get in (
        lambda b: b["cond"],
        lambda b: b["uncond"],
        lambda b: b["skip"],
        lambda b: b["cond"].double() - b["skip"].double(),
    ):
        budget = (get(plain).double() - get(exact)).norm()
        another_order = (get(batched).double() - get(plain).double()).norm()
        error = (get(engine).double() - get(exact)).norm()
        assert error <= budget + another_order


PLAIN = {
    "scale_0": STGConfig(layers=(1,), scale=0.0),
    "outside": STGConfig(layers=(1,), start=0.5),
    "cfg_star": STGConfig(layers=(1,), scale=0.0, cfg_star=True),
}


def test_float64_stays_float64():
    transformer = tiny_transformer(dtype=torch.float64)
    shared, cond, uncond = tiny_inputs(1, dtype=torch.float64)
    config = STGConfig(layers=(1,), scale=1.5, rescale=0.5, cfg_star=True)
    with Denoiser(transformer, config, execution="serial") as denoiser:
        actual = denoiser(shared, cond, uncond, guidance_scale=3.0)
    expected = three_passes(transformer, config, shared, cond, uncond, 3.0)
    assert relative_error(actual, expected) <= 16 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN)
def test_steps_without_skips_are_plain_diffusers(transformer, config):
    shared, cond, uncond = tiny_inputs(2)
    rows = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in shared.items()}
    u, c = transformer(**rows, **{k: torch.cat([uncond[k], cond[k]]) for k in cond}, return_dict=False)[0].chunk(2)
    with Denoiser(transformer, config) as denoiser:
        actual = denoiser(shared, cond, uncond, guidance_scale=3.0, progress=0.25)
    assert torch.equal(actual, u + 3.0 * (c - u))


def test_positional_block_arguments(transformer):
    """Another version of the transformer may pass its blocks' arguments by position."""
    shared, cond, uncond = tiny_inputs(1)
    config = STGConfig(layers=(1,))
    expected = passes_one_by_one(transformer, config.skips, shared, cond, uncond)
    with Denoiser(transformer, config) as denoiser:
        for block in denoiser.blocks:
            hooked = block.forward
            names = list(inspect.signature(type(block).forward).parameters)[1:]
            block.forward = lambda hooked=hooked, names=names, **kwargs: hooked(*map(kwargs.get, names))
        actual = denoiser.branches(shared, cond, uncond)
        for block in denoiser.blocks:
            block.forward = block.forward.__defaults__[0]
    assert relative_error(actual["skip"], expected["skip"]) <= FP32_RELATIVE


@pytest.mark.parametrize(("heads", "head_dim", "tokens"), [(3, 6, 5), (1, 6, 7), (5, 2, 3)])
@pytest.mark.parametrize("mode", ["residual", "attention"])
def test_serial_is_bitwise_at_odd_sizes(mode, heads, head_dim, tokens):
    """Rows inside a batch begin at odd addresses there, where kernels may sum in another order."""
    transformer = tiny_transformer(heads=heads, head_dim=head_dim, channels=3)
    shared, cond, uncond = tiny_inputs(3, per_token=True, tokens=tokens, channels=3)
    config = STGConfig(layers=(1,), mode=mode, extra_skips=(Skip((2,)),))
    expected = video_by_video(transformer, config, shared, cond, uncond)
    with Denoiser(transformer, config, execution="serial") as denoiser:
        for _ in range(2):
            actual = denoiser.branches(shared, cond, uncond)
            for name in expected:
                assert torch.equal(actual[name], expected[name]), name


def test_arithmetic_of_the_model():
    transformer = tiny_transformer(dtype=torch.bfloat16)
    shared, cond, uncond = tiny_inputs(2, dtype=torch.bfloat16)
    results = {}
    for arithmetic in ("model", "float32"):
        config = STGConfig(layers=(1,), scale=1.7, arithmetic=arithmetic)
        with Denoiser(transformer, config, execution="serial") as denoiser:
            branches = denoiser.branches(shared, cond, uncond)
            results[arithmetic] = denoiser(shared, cond, uncond, guidance_scale=3.3)
        c, u, p = branches["cond"], branches["uncond"], branches["skip"]
        if arithmetic == "float32":
            c, u, p = c.float(), u.float(), p.float()
        assert torch.equal(results[arithmetic], (u + 3.3 * (c - u) + 1.7 * (c - p)).bfloat16())
    assert not torch.equal(results["model"], results["float32"])


@pytest.mark.parametrize("scheduled", [0.0, 0.5, 1.0])
def test_a_scheduled_guidance_scale_of_at_most_1_drops_uncond(transformer, scheduled):
    shared, cond, uncond = tiny_inputs(1)
    entry = ScheduleEntry(0.5, (1,), 1.5, guidance_scale=scheduled)
    config = STGConfig(schedule=STGSchedule((entry,), "at_or_below"))
    with Denoiser(transformer, config) as denoiser:
        actual = denoiser(shared, cond, uncond, guidance_scale=3.0, sigma=0.7)
        branches = denoiser.branches(shared, cond, sigma=0.7)
    assert torch.equal(actual, branches["cond"] + 1.5 * (branches["cond"] - branches["skip"]))


def test_detach_leaves_the_transformer_as_it_was():
    transformer = tiny_transformer()
    before = {name: dict(vars(module)) for name, module in transformer.named_modules()}
    denoiser = Denoiser(transformer, STGConfig(layers=(1,)))
    assert {name: dict(vars(module)) for name, module in transformer.named_modules()} != before
    denoiser.detach()
    denoiser.detach()
    after = {name: dict(vars(module)) for name, module in transformer.named_modules()}
    for name, attributes in before.items():
        assert set(after[name]) == set(attributes), name


def test_an_error_inside_the_forward_leaves_the_denoiser_usable(transformer):
    shared, cond, uncond = tiny_inputs(1)
    with Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
        expected = denoiser.branches(shared, cond, uncond)
        failing = transformer.transformer_blocks[2].register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            denoiser.branches(shared, cond, uncond)
        failing.remove()
        assert len(denoiser.memo) == 0
        assert all(
            torch.equal(value, expected[name]) for name, value in denoiser.branches(shared, cond, uncond).items()
        )
