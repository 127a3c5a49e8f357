"""Blocks under torch.compile: the same predictions, one compilation per class, and nothing that changes is missed."""

from contextlib import contextmanager

import accelerate
import pytest
import stg_kernels
import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from engine.tiny import latents_of, tiny_inputs, tiny_pipeline, tiny_transformer
from models.case import cases, relative_error
from peft import LoraConfig
from torch._dynamo.utils import counters

import stg_engine
from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.hooks import hook_of
from stg_engine.runtime import compile as regional

FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
CASES = {case.name: case for case in cases()}
ONE_OF_EACH = (
    *("Allegro", "CogVideoX-5B", "Cosmos 1.0", "HunyuanVideo", "HunyuanVideo-1.5", "Latte", "LTX-2.3", "Mochi"),
    *("Sana-Video", "SVD", "Wan T2V", "SkyReels-V2 DF"),
)
SERIAL_TOO = {"CogVideoX-5B", "Wan T2V"}  # a row is a slice of memory, or in the middle of it: one graph all the same
MORE_GRAPHS = {"SVD", "Mochi"}  # a block of one entry per row; a graph per number of rows


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Dynamo without Inductor, which takes seconds per graph."""
    monkeypatch.setattr(regional, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def outputs(branches):
    return branches if isinstance(branches, tuple) else (branches,)


def assert_equal(actual, expected):
    for ours, theirs in zip(outputs(actual), outputs(expected), strict=True):
        for name in theirs:
            assert relative_error(ours[name], theirs[name]) <= FP32_RELATIVE, name


def branches(model, inputs, config, compile="default", **options):
    with Denoiser(model, config, kernels="off", compile=compile, **options) as denoiser:
        return denoiser.branches(*inputs, progress=0.1), denoiser.compiler


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_family(name):
    """In one graph per class and shape of weights for several rows, skips or not; in another for a single row."""
    case = CASES[name]
    model, last, axis = case.model(torch.float32), case.layers - 1, case.axes[-1]
    inputs = case.inputs(1, torch.float32)
    for mode in case.modes:
        config = STGConfig(layers=(last,), mode=mode, axis=axis, stop=0.5)
        expected = case.passes(model, config.skips, *inputs)
        for options in ({}, {"execution": "serial"}) if name in SERIAL_TOO else ({},):
            with Denoiser(model, config, kernels="off", compile="default", **options) as denoiser:
                kinds = len(set(denoiser.compiler._keys.values()))
                plan = denoiser.plans()
                for progress in (0.1, 0.9):
                    actual = outputs(denoiser.branches(*inputs, progress=progress))
                    for i, output in enumerate(actual):
                        for branch in output:
                            assert relative_error(output[branch], expected[branch][i]) <= FP32_RELATIVE, branch
                assert f"in {plan.num_blocks} of {plan.num_blocks} blocks" in denoiser.compiler.used
            assert graphs() <= kinds * (1 + (name in SERIAL_TOO) + (name in MORE_GRAPHS))
        assert sum(bool(plan.changes_inside(block)) for block in range(plan.num_blocks)) <= 2


def test_no_recompilation_within_a_run():
    inputs, model = tiny_inputs(), tiny_transformer(num_layers=6)
    config = STGConfig(layers=(4,), start=0.3, stop=0.7, extra_skips=(Skip((2,)),))
    with Denoiser(model, config, compile="default") as denoiser:
        assert {len(rows) for rows in denoiser.plans().rows} == {2, 3, 4}
        denoiser.branches(*inputs, progress=0.5)
        assert graphs() == 1
        with torch.compiler.set_stance("fail_on_recompile"):
            for step in range(10):
                denoiser.branches(*inputs, progress=step / 10)


def test_blocks_share_their_graph():
    for layers in (2, 12):
        torch._dynamo.reset()
        counters.clear()
        branches(tiny_transformer(num_layers=layers), tiny_inputs(), STGConfig(layers=(1,)))
        assert graphs() == 1


@pytest.mark.parametrize("options", [{}, {"max_rows": 2}, {"execution": "serial"}], ids=str)
@pytest.mark.parametrize("videos", [1, 3])
def test_rows_at_once(videos, options):
    model, config = tiny_transformer(), STGConfig(layers=(2,), extra_skips=(Skip((1,), mode="attention"),))
    inputs = tiny_inputs(videos, per_token=True)
    expected, _ = branches(model, inputs, config, compile=None)
    assert_equal(branches(model, inputs, config, **options)[0], expected)


def test_inductor(monkeypatch):
    monkeypatch.setattr(regional, "BACKEND", "inductor")
    model, config = tiny_transformer(num_layers=3), STGConfig(layers=(2,))
    expected, _ = branches(model, tiny_inputs(), config, compile=None)
    actual, compiler = branches(model, tiny_inputs(), config)
    assert_equal(actual, expected)
    assert not torch.equal(actual["cond"], expected["cond"]), "Inductor sums in another order"
    assert compiler.used == "torch.compile (default) in 2 of 3 blocks; 1 as they are: self-attention shared"


def lora(model):
    model.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))


def scaled(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.25)


class Doubled(LTXVideoAttnProcessor):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def on_every(path, change):
    def apply(model):
        for block in model.transformer_blocks:
            change(block.get_submodule(path))

    return apply


def replace_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


CHANGES = {
    "adapter": lora,
    "processor": on_every("attn1", lambda module: module.set_processor(Doubled())),
    "hook": on_every("ff", lambda module: module.register_forward_hook(lambda *args: 2 * args[-1])),
    "pre-hook": on_every("ff.net.0", lambda module: module.register_forward_pre_hook(lambda _, args: (2 * args[0],))),
    "forward": on_every("ff", replace_forward),
    "epsilon": on_every("norm1", lambda module: setattr(module, "eps", 0.5)),
    "weight": on_every("ff.net.2", lambda module: module.weight.data.mul_(2)),
    "new weight": on_every("ff.net.2", lambda m: setattr(m, "weight", torch.nn.Parameter(2 * m.weight))),
    "new module": on_every("ff", lambda module: module.net.append(torch.nn.Tanh())),
    "dtype": lambda model: model.double(),
}
"""Of the model between two steps."""


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_compilation_count(change):
    model, inputs, config = tiny_transformer(num_layers=2), tiny_inputs(), STGConfig(layers=(1,))
    with Denoiser(model, config, kernels="off", compile="default") as denoiser:
        before = denoiser.branches(*inputs)
        CHANGES[change](model)
        if change == "dtype":
            inputs = tiny_inputs(dtype=torch.float64)
        after = denoiser.branches(*inputs)
    expected, _ = branches(model, inputs, config, compile=None)
    assert_equal(after, expected)
    assert change == "dtype" or relative_error(after["cond"], before["cond"]) > 100 * FP32_RELATIVE
    assert after["cond"].dtype is inputs[0]["hidden_states"].dtype


@pytest.mark.parametrize("change", [scaled, lambda model: model.disable_adapters()], ids=["scale", "off"])
def test_changes_of_an_adapter_count(change):
    model, inputs, config = tiny_transformer(num_layers=2), tiny_inputs(), STGConfig(layers=(1,))
    lora(model)
    with Denoiser(model, config, kernels="off", compile="default") as denoiser:
        before = denoiser.branches(*inputs)
        change(model)
        after = denoiser.branches(*inputs)
        assert "in 1 of 2 blocks" in denoiser.compiler.used  # through PEFT's layers
    expected, _ = branches(model, inputs, config, compile=None)
    assert_equal(after, expected)
    assert relative_error(after["cond"], before["cond"]) > 100 * FP32_RELATIVE


def test_offloaded_weights_run_blocks_as_they_are():
    model, inputs, config = tiny_transformer(num_layers=2), tiny_inputs(), STGConfig(layers=(1,))
    expected, _ = branches(model, inputs, config, compile=None)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    actual, compiler = branches(model, inputs, config)
    assert_equal(actual, expected)
    assert "1 as they are: hooks inside" in compiler.used


@pytest.mark.skipif(not stg_kernels.accelerates(torch.device("cpu")), reason="the C++ kernels are not compiled")
def test_the_guidance_may_be_fused():
    model, inputs, config = tiny_transformer(num_layers=2), tiny_inputs(), STGConfig(layers=(1,), rescale=0.7)
    results = []
    for options in ({"kernels": "off"}, {"compile": "default"}):
        with Denoiser(model, config, **options) as denoiser:
            results.append(denoiser(*inputs, guidance_scale=3.0))
            used, is_on = denoiser.fusion.used, denoiser.fusion.is_on
    assert relative_error(*results) <= 10 * FP32_RELATIVE
    assert used == "stg_kernels (C++) in the guidance alone: compile is set"
    assert is_on


def test_hooks_inside_run_the_block_as_it_is():
    model = tiny_transformer()
    calls = []
    model.transformer_blocks[3].ff.register_forward_hook(lambda *_: calls.append(1))
    _, compiler = branches(model, tiny_inputs(), STGConfig(layers=(2,)))
    assert calls == [1]
    assert compiler.used == (
        "torch.compile (default) in 2 of 4 blocks; 1 as they are: self-attention shared; 1 as they are: hooks inside"
    )


def test_gradients():
    with torch.enable_grad():
        result, compiler = branches(tiny_transformer(num_layers=2), tiny_inputs(), STGConfig(layers=(1,)))
        result["cond"].sum().backward()
    assert "1 as they are: gradients are recorded" in compiler.used
    assert graphs() == 0


def test_a_block_that_cannot_be_traced():
    model = tiny_transformer()

    class Untraceable(LTXVideoAttnProcessor):
        def __call__(self, *args, **kwargs):
            torch._dynamo.graph_break()
            return super().__call__(*args, **kwargs)

    for block in model.transformer_blocks:
        block.attn2.set_processor(Untraceable())
    expected, _ = branches(model, tiny_inputs(), STGConfig(layers=(2,)), compile=None)
    with pytest.warns(UserWarning, match="LTXVideoTransformerBlock run as they are: torch.compile cannot trace it"):
        actual, compiler = branches(model, tiny_inputs(), STGConfig(layers=(2,)))
    assert_equal(actual, expected)
    assert "in 0 of 4 blocks" in compiler.used


@torch._dynamo.config.patch(recompile_limit=1)
def test_too_many_variants():
    model, config = tiny_transformer(), STGConfig(layers=(2,))
    branches(model, tiny_inputs(), config)
    with pytest.warns(UserWarning, match="recompile_limit"):
        serial, compiler = branches(model, tiny_inputs(), config, execution="serial")
    assert_equal(serial, branches(model, tiny_inputs(), config, compile=None)[0])
    assert "3 as they are: more variants" in compiler.used


def state(model):
    return {name: set(vars(module)) for name, module in model.named_modules()}


def test_detach_leaves_no_trace():
    model, inputs = tiny_transformer(), tiny_inputs()
    before, attributes = state(model), set(dir(inputs[1]["encoder_hidden_states"]))
    with Denoiser(model, STGConfig(layers=(2,)), compile="default") as denoiser:
        hooked = state(model)
        denoiser.branches(*inputs)
        assert state(model) == hooked
        block = model.transformer_blocks[1]
        assert block.attn1.forward is hook_of(block.attn1).installed
    assert state(model) == before
    assert set(dir(inputs[1]["encoder_hidden_states"])) == attributes
    model.transformer_blocks[0].compile(backend="eager")  # the user's own
    with pytest.raises(RuntimeError, match="are compiled"):
        Denoiser(model, STGConfig(layers=(2,)), compile="default")


def test_hooks_are_back_after_an_error(monkeypatch):
    model, inputs = tiny_transformer(), tiny_inputs()

    def broken(*_):
        raise KeyError("broken")

    monkeypatch.setattr(regional, "_compiled", lambda *_: lambda *_, **__: broken())
    with Denoiser(model, STGConfig(layers=(2,)), compile="default") as denoiser:
        hooked = state(model)
        with pytest.raises(KeyError, match="broken"):
            denoiser.branches(*inputs)
        assert state(model) == hooked


def test_arguments_come_in_one_layout_and_stay_as_they_were():
    whole = torch.randn(3, 1, 4)
    before = set(dir(whole))
    for rows in (whole, whole[:2], whole[1:], whole[2:]):
        same = regional._alike(rows)
        assert torch.equal(same, rows)
        assert (same.data_ptr(), same.stride(), same.storage_offset()) == (rows.data_ptr(), (4, 4, 1), 0)
        assert same._base is None
    assert set(dir(whole)) == before
    assert torch.equal(regional._alike(whole[:1].expand(3, 1, 4)), whole[:1].repeat(3, 1, 1))


def test_rows_of_a_device_that_is_not_the_current_one(monkeypatch):
    """`__dlpack__` refuses them."""
    current, rows = [], torch.randn(3, 4)[1:]

    @contextmanager
    def device_of(tensor):
        current.append(tensor.data_ptr())
        yield
        current.clear()

    def from_dlpack(tensor):
        assert current == [tensor.data_ptr()]
        return torch.utils.dlpack.from_dlpack(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch, "from_dlpack", from_dlpack)
    assert torch.equal(regional._alike(rows), rows)


def test_what_all_rows_have_in_common_is_copied_once_per_step(monkeypatch):
    """Not in front of every block."""
    seen, alike = [], regional._alike

    def spy(value):
        seen.extend(value if isinstance(value, tuple) else (value,))
        return alike(value)

    monkeypatch.setattr(regional, "_alike", spy)
    branches(tiny_transformer(), tiny_inputs(), STGConfig(layers=(2,)))
    assert seen
    assert all(value is None or value.is_contiguous() for value in seen)


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead", "", True])
def test_modes_that_are_not_allowed(mode):
    with pytest.raises(ValueError, match=r"compile=.* is not allowed; choose None or one of 'default', 'max-auto"):
        Denoiser(tiny_transformer(), STGConfig(layers=(2,)), compile=mode)


def test_a_pipeline():
    """Steps without skip branches are compiled, too, by the same graph; the report says what was."""
    pipe, config = tiny_pipeline(), STGConfig(layers=(2,), stop=0.5)
    with stg_engine.attach(pipe, config, kernels="off") as engine:
        expected = latents_of(pipe)
        assert "compiled" not in str(engine.report())
    with stg_engine.attach(pipe, config, kernels="off", compile="default") as engine:
        assert relative_error(latents_of(pipe), expected) <= 10 * FP32_RELATIVE
        assert engine.report().guided_steps < engine.report().steps
        assert "compiled   torch.compile (default) in 4 of 4 blocks" in str(engine.report())
    assert graphs() == 1
