"""Blocks built from stg_kernels against the modules as they are; on a CPU the ops run their references."""

from collections import defaultdict

import pytest
import stg_kernels
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from engine.tiny import latents_of, tiny_inputs, tiny_pipeline, tiny_transformer
from peft import LoraConfig
from stg_kernels import choose
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import stg_engine
from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.reference import passes_one_by_one, three_passes

FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
EVERY_FORK = STGConfig(layers=(1, 3), extra_skips=(Skip((0, 2), mode="attention"), Skip((0,)), Skip((2,))))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, params=["reference", "native"])
def implementation(request, monkeypatch):
    """What the ops run on a CPU; an installation without the compiled library has the references alone."""
    if request.param == "native" and "cpu" not in stg_kernels.native_devices():
        pytest.skip("stg_kernels._C was not built")
    if request.param == "reference":
        monkeypatch.setattr(choose, "native_devices", frozenset)
        monkeypatch.setattr(stg_kernels, "accelerates", lambda device: True)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("max_rows", [None, 1, 2])
@pytest.mark.parametrize("per_token", [False, True], ids=["t_per_video", "t_per_token"])
@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("with_uncond", [True, False], ids=["cfg", "no_cfg"])
def test_branches_equal_passes_run_alone(videos, per_token, with_uncond, max_rows):
    transformer = tiny_transformer()
    shared, cond, uncond = tiny_inputs(videos, per_token=per_token)
    uncond = uncond if with_uncond else None
    expected = passes_one_by_one(transformer, EVERY_FORK.skips, shared, cond, uncond)
    with Denoiser(transformer, EVERY_FORK, max_rows=max_rows) as denoiser:
        for _ in range(2):  # the second call takes prompt keys and values from the first
            actual = denoiser.branches(shared, cond, uncond)
            assert denoiser.fusion.used == "stg_kernels (C++) in 4 of 4 blocks"
            for name in expected:
                assert relative_error(actual[name], expected[name]) <= FP32_RELATIVE, name


def test_a_row_that_skips_attention_takes_the_values_of_the_row_it_forks_from():
    transformer, inputs = tiny_transformer(), tiny_inputs(2)
    rows = []
    for layer in (1, 2):
        transformer.transformer_blocks[layer].attn1.to_v.register_forward_pre_hook(
            lambda module, args: rows.append(len(args[0]))
        )
    with Denoiser(transformer, STGConfig(layers=(1, 2), mode="attention")) as denoiser:
        denoiser.branches(*inputs)
    assert rows == [4, 4, 2]  # at the fork uncond and cond; behind it the values of skip's own input, too


@pytest.mark.parametrize("mode", ["residual", "attention"])
@pytest.mark.parametrize("layers", [(0,), (3,), (1, 2)], ids=str)
def test_modes_and_layers(layers, mode):
    transformer, inputs = tiny_transformer(), tiny_inputs(2)
    config = STGConfig(layers=layers, mode=mode)
    expected = passes_one_by_one(transformer, config.skips, *inputs)
    with Denoiser(transformer, config) as denoiser:
        actual = denoiser.branches(*inputs)
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= FP32_RELATIVE, name


@pytest.mark.parametrize(
    "settings", [{}, {"rescale": 0.7}, {"cfg_star": True, "rescale": 0.4, "rescale_over": "batch"}]
)
@pytest.mark.parametrize("with_uncond", [True, False], ids=["cfg", "no_cfg"])
def test_guided_prediction(settings, with_uncond):
    transformer, (shared, cond, uncond) = tiny_transformer(), tiny_inputs(2)
    uncond = uncond if with_uncond else None
    config = STGConfig(layers=(1,), scale=1.5, extra_skips=(Skip((3,), 0.5, "attention"),), **settings)
    expected = three_passes(transformer, config, shared, cond, uncond, 4.0)
    with Denoiser(transformer, config) as denoiser:
        actual = denoiser(shared, cond, uncond, guidance_scale=4.0 if with_uncond else None)
    # The guidance scales multiply the error of the branches.
    assert relative_error(actual, expected) <= (4.0 + 2 * 1.5) * FP32_RELATIVE
    assert actual.dtype == expected.dtype


def test_serial_does_not_depend_on_the_batch():
    transformer, (shared, cond, uncond) = tiny_transformer(heads=3, head_dim=6), tiny_inputs(3, per_token=True)
    with Denoiser(transformer, EVERY_FORK, execution="serial") as denoiser:
        together = denoiser.branches(shared, cond, uncond)
        for video in range(3):
            alone = denoiser.branches(
                *(
                    {k: v[video : video + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
                    for inputs in (shared, cond, uncond)
                )
            )
            for name in alone:
                assert torch.equal(together[name][video], alone[name][0]), name


def test_bf16_is_as_near_as_the_plain_forward():
    """Over eight models, no ratio of errors is larger than 1 by more than twice its standard error."""
    config, ratios = STGConfig(layers=(2,)), defaultdict(list)
    for seed in range(8):
        exact_model, model = (tiny_transformer(seed=seed, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
        for weight, rounded in zip(exact_model.parameters(), model.parameters(), strict=True):
            weight.data = rounded.data.double()
        inputs = tiny_inputs(2, per_token=True, dtype=torch.bfloat16, seed=seed)
        double = [
            {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in group.items()}
            for group in inputs
        ]
        exact = passes_one_by_one(exact_model, config.skips, *double)
        plain = passes_one_by_one(model, config.skips, *inputs)
        with Denoiser(model, config) as denoiser:
            engine = denoiser.branches(*inputs)
        for branches in (exact, plain, engine):
            branches["delta"] = branches["cond"].double() - branches["skip"].double()
        for name in exact:
            errors = [(branches[name].double() - exact[name]).norm() for branches in (engine, plain)]
            ratios[name].append(errors[0] / errors[1])
    for name, values in ratios.items():
        ratio = torch.stack(values)
        assert ratio.mean() <= 1 + 2 * ratio.std() / len(ratio) ** 0.5, name


@pytest.mark.parametrize("before", [True, False], ids=["adapter_before", "adapter_after"])
def test_an_adapter_on_every_linear(before):
    transformer, inputs = tiny_transformer(), tiny_inputs()
    every_linear = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    lora = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=every_linear)
    config = STGConfig(layers=(1,))
    if before:
        transformer.add_adapter(lora)
    with Denoiser(transformer, config) as denoiser:
        if not before:
            transformer.add_adapter(lora)
        actual = denoiser.branches(*inputs)
        assert denoiser.fusion.is_on
    expected = passes_one_by_one(transformer, config.skips, *inputs)
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= FP32_RELATIVE, name


class Processor(LTXVideoAttnProcessor):
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return 0.5 * super().__call__(attn, hidden_states, *args, **kwargs)


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def doubled(forward):
    return lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def double_by_hook(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)


def double_by_forward(module):
    module.forward = doubled(module.forward)


def double_by_class(module):
    kind = type(module)
    module.__class__ = type("Other", (kind,), {"forward": lambda *args, **kwargs: 2 * kind.forward(*args, **kwargs)})


BYPASSED = ("norm1", "norm2", "attn1", "attn2", "attn1.norm_q", "attn1.norm_k", "attn2.norm_q")
CHANGES = {
    **{f"{path}_hook": (path, double_by_hook) for path in BYPASSED},
    **{f"{path}_forward": (path, double_by_forward) for path in BYPASSED},
    **{f"{path}_class": (path, double_by_class) for path in BYPASSED},
    "attn2_pre_hook": (
        "attn2",
        lambda attention: attention.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {**kwargs, "encoder_hidden_states": 2 * kwargs["encoder_hidden_states"]},
            ),
            with_kwargs=True,
        ),
    ),
    "attn1_processor": ("attn1", lambda attention: attention.set_processor(Processor())),
    "attn2_processor": ("attn2", lambda attention: attention.set_processor(Processor())),
    "block_forward": ("", double_by_forward),
    "block_class": ("", double_by_class),
    "block_hook": (
        "",
        lambda block: HookRegistry.check_if_exists_or_initialize(block).register_hook(Doubling(), "other"),
    ),
    "unequal_eps": ("attn1.norm_k", lambda norm: setattr(norm, "eps", 0.1)),
    "attn1_no_eps": ("attn1", lambda attention: set_eps(None, attention.norm_q, attention.norm_k)),
    "attn2_no_eps": ("attn2.norm_q", lambda norm: set_eps(None, norm)),
}
"""Name -> path of a module in a block, and what is done to it."""


def set_eps(eps, *norms):
    for norm in norms:
        norm.eps = eps


def assert_equals_passes(transformer, inputs, fused_blocks):
    """The branches are those of the modules, and so many of the four blocks were fused."""
    config = STGConfig(layers=(1,))
    expected = passes_one_by_one(transformer, config.skips, *inputs)
    with Denoiser(transformer, config) as denoiser:
        actual = denoiser.branches(*inputs)
        others = ", the others have hooks, processors or modules that the kernels do not cover"
        used = f"stg_kernels (C++) in {fused_blocks} of 4 blocks{others if fused_blocks < 4 else ''}"
        assert denoiser.fusion.used == used
        assert denoiser.fusion.is_on is (fused_blocks > 0)
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        assert relative_error(actual[name], expected[name]) <= FP32_RELATIVE, name


def test_affine_norms():
    assert_equals_passes(tiny_transformer(affine=True), tiny_inputs(2), 4)


NORMS = [("norm1",), ("norm2",), ("attn1.norm_q", "attn1.norm_k"), ("attn2.norm_q",), ("attn2.norm_k",)]


@pytest.mark.parametrize("paths", NORMS, ids=str)
def test_eps_is_the_norm_s_own(paths):
    transformer = tiny_transformer()
    for block in transformer.transformer_blocks:
        set_eps(0.5, *map(block.get_submodule, paths))
    assert_equals_passes(transformer, tiny_inputs(), 4)


@pytest.mark.parametrize("path", ["attn1", "attn2"])
def test_an_attention_backend_that_was_set_is_used(path, monkeypatch):
    name, backends = AttentionBackendName._NATIVE_MATH, _AttentionBackendRegistry._backends
    monkeypatch.setitem(backends, name, doubled(backends[name]))
    transformer = tiny_transformer()
    for block in transformer.transformer_blocks:
        block.get_submodule(path).processor._attention_backend = name
    assert_equals_passes(transformer, tiny_inputs(), 4)


def test_a_forward_replaced_after_the_hooks_is_not_passed_by():
    transformer, inputs = tiny_transformer(), tiny_inputs()
    config = STGConfig(layers=(1,))
    with Denoiser(transformer, config) as denoiser:
        attention = transformer.transformer_blocks[2].attn1
        hooked, attention.forward = attention.forward, doubled(attention.forward)
        actual = denoiser.branches(*inputs)
        attention.forward = hooked
    double_by_forward(transformer.transformer_blocks[2].attn1)
    expected = passes_one_by_one(transformer, config.skips, *inputs)
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= FP32_RELATIVE, name


@pytest.mark.parametrize("path", ["norm1", "norm2", "attn1.norm_q", "attn1.norm_k", "attn2.norm_q"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norm_weights_of_another_dtype_run_as_modules(dtype, path):
    transformer, inputs, actual = tiny_transformer(affine=True), tiny_inputs(), {}
    for block in transformer.transformer_blocks:
        block.get_submodule(path).to(dtype)
    for kernels in ("auto", "off"):
        with Denoiser(transformer, STGConfig(layers=(1,)), kernels=kernels) as denoiser:
            actual[kernels] = denoiser(*inputs, guidance_scale=3.0)
            assert not denoiser.fusion.is_on
    assert torch.equal(actual["auto"], actual["off"])


def warp_by_hook(rope):
    rope.register_forward_hook(lambda module, args, tables: warped(tables))


def warp_by_forward(rope):
    forward = rope.forward
    rope.forward = lambda *args: warped(forward(*args))


def warp_by_class(rope):
    kind = type(rope)
    rope.__class__ = type("Other", (kind,), {"forward": lambda *args: warped(kind.forward(*args))})


def warped(tables):
    return tuple(table * torch.linspace(0.5, 1, table.shape[-1]) for table in tables)


@pytest.mark.parametrize("change", [warp_by_hook, warp_by_forward, warp_by_class])
def test_rope_tables_that_were_changed_are_not_assumed(change):
    transformer = tiny_transformer()
    change(transformer.rope)
    assert_equals_passes(transformer, tiny_inputs(), 0)


def test_odd_heads_run_as_modules():
    assert_equals_passes(tiny_transformer(heads=2, head_dim=9), tiny_inputs(), 0)


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_with_a_change_that_would_be_passed_by_is_not_fused(change):
    transformer, (path, make) = tiny_transformer(), CHANGES[change]
    make(transformer.transformer_blocks[2].get_submodule(path))
    assert_equals_passes(transformer, tiny_inputs(), 3)


def double_outputs_of_norms(module, args, output):
    return 2 * output if isinstance(module, torch.nn.RMSNorm) else None


def shift_inputs_of_norms(module, args):
    return (args[0] + 1,) if isinstance(module, torch.nn.RMSNorm) else None


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        (register_module_forward_hook, double_outputs_of_norms),
        (register_module_forward_pre_hook, shift_inputs_of_norms),
    ],
)
def test_hooks_on_all_modules_are_not_passed_by(register, hook):
    transformer, inputs, config = tiny_transformer(), tiny_inputs(), STGConfig(layers=(1,))
    handle = register(hook)
    try:
        expected = passes_one_by_one(transformer, config.skips, *inputs)
        with Denoiser(transformer, config) as denoiser:
            actual = denoiser.branches(*inputs)
            assert denoiser.fusion.used == "modules as they are: forward hooks on all modules"
    finally:
        handle.remove()
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= FP32_RELATIVE, name


def test_why_not():
    transformer, inputs = tiny_transformer(), tiny_inputs()
    config = STGConfig(layers=(1,))

    def used(run, **options):
        with Denoiser(transformer, config, **options) as denoiser:
            run(denoiser)
            assert not denoiser.fusion.is_on
            return denoiser.fusion.used

    assert used(lambda d: d.branches(*inputs), kernels="off") == "modules as they are: kernels='off'"
    with torch.enable_grad():
        assert used(lambda d: d.branches(*inputs)) == "modules as they are: gradients are recorded"
    with torch.autocast("cpu", torch.bfloat16):
        assert used(lambda d: d.branches(*inputs)) == "modules as they are: autocast is on"


def test_another_default_dtype():
    transformer, inputs = tiny_transformer(), tiny_inputs()
    with Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
        expected = denoiser(*inputs, guidance_scale=3.0)
    torch.set_default_dtype(torch.float64)
    try:
        with Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
            actual = denoiser(*inputs, guidance_scale=3.0)
    finally:
        torch.set_default_dtype(torch.float32)
    # RoPE's coordinates and time embedding may be rounded otherwise; the dtype of the scales must not raise.
    assert relative_error(actual, expected) <= FP32_RELATIVE


def test_pipeline_and_report():
    plain, pipe = tiny_pipeline(), tiny_pipeline()
    config = STGConfig(layers=(2,), scale=1.5, rescale=0.5)
    with stg_engine.attach(plain, config, kernels="off") as engine:
        expected = latents_of(plain, ["a red cat", "blue dog"])
        assert "kernels    modules as they are" in str(engine.report())
    with stg_engine.attach(pipe, config) as engine:
        actual = latents_of(pipe, ["a red cat", "blue dog"])
        assert "kernels    stg_kernels (C++) in 4 of 4 blocks\n" in str(engine.report())
    assert (actual - expected).norm() <= FP32_RELATIVE * expected.norm()


def test_report_of_a_call_without_a_guided_step():
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, STGConfig(layers=(2,), scale=0.0)) as engine:
        latents_of(pipe)
        assert engine.report().kernels == "none: no guided step"
