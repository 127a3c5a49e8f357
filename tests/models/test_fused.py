"""Blocks built from stg_kernels against the modules as they are, in every family that has them."""

from collections import defaultdict

import pytest
import stg_kernels
import torch
from models.case import cases, randomise, relative_error
from peft import LoraConfig
from stg_kernels import choose
from torch import nn

from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.models import spec_of

FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
CASES = [case for case in cases() if spec_of(case.model(torch.float32)).fused is not None]
FAMILIES = list({spec_of(case.model(torch.float32)).fused: case for case in CASES}.values())
"""One case each."""
SKIPS = [(case, skip) for case in CASES for skip in case.skips()]


def _id(value):
    if isinstance(value, Skip):
        return "-".join(map(str, (value.mode, *filter(None, [value.axis]), *value.layers)))
    return str(value)


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


references = pytest.mark.parametrize("implementation", ["reference"], indirect=True)


def config_of(*skips):
    first, *others = skips
    return STGConfig(layers=first.layers, mode=first.mode, axis=first.axis, extra_skips=tuple(others))


def every_skip(case):
    """First and last layer, in all modes and axes at once."""
    ends = [skip for skip in case.skips() if len(skip.layers) == 2]
    return config_of(Skip((0,), mode=ends[0].mode, axis=ends[0].axis), *ends)


def outputs(branches):
    """{"cond": [tensor, ...]}: models with two outputs have a dict for each."""
    each = branches if isinstance(branches, tuple) else (branches,)
    return {name: [output[name] for output in each] for name in each[0]}


def assert_near(actual, expected):
    assert set(actual) == set(expected)
    for name, tensors in actual.items():
        for tensor, other in zip(tensors, expected[name], strict=True):
            assert tensor.dtype == other.dtype
            assert relative_error(tensor, other) <= FP32_RELATIVE, name


@pytest.mark.parametrize(("case", "skip"), SKIPS, ids=_id)
def test_branches_equal_passes_run_alone(case, skip):
    model, config = case.model(torch.float32), config_of(skip)
    inputs = case.inputs(2, torch.float32)
    expected = case.passes(model, config.skips, *inputs)
    with Denoiser(model, config) as denoiser:
        for _ in range(2):  # the second call takes what the first kept
            assert_near(outputs(denoiser.branches(*inputs)), expected)
            count = len(denoiser.blocks)
            assert denoiser.fusion.used.endswith(f"{count} of {count} blocks")


@pytest.mark.parametrize("max_rows", [None, 1, 2])
@pytest.mark.parametrize("videos", [1, 3])
@pytest.mark.parametrize("with_uncond", [True, False], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_several_skip_branches(case, with_uncond, videos, max_rows):
    model, config = case.model(torch.float32), every_skip(case)
    shared, cond, uncond = case.inputs(videos, torch.float32)
    inputs = shared, cond, uncond if with_uncond else None
    expected = case.passes(model, config.skips, *inputs)
    with Denoiser(model, config, max_rows=max_rows) as denoiser:
        assert_near(outputs(denoiser.branches(*inputs)), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_serial_does_not_depend_on_the_batch(case):
    model = case.model(torch.float32)
    inputs = case.inputs(3, torch.float32)
    rows = {*spec_of(model).latents, *spec_of(model).prompt}
    with Denoiser(model, every_skip(case), execution="serial") as denoiser:
        together = outputs(denoiser.branches(*inputs))
        for video in range(3):
            alone = (
                {k: v.chunk(3)[video] if k in rows and v is not None else v for k, v in group.items()}
                for group in inputs
            )
            for name, tensors in outputs(denoiser.branches(*alone)).items():
                for tensor, other in zip(tensors, together[name], strict=True):
                    assert torch.equal(tensor[0], other[video]), name


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_bf16_is_as_near_as_the_plain_forward(case):
    """Over eight models, no ratio of errors is larger than 1 by more than three times its standard error.

    There are some hundred ratios: by chance a few are beyond two.
    """
    config, ratios = config_of(*(s for s in case.skips() if s.layers == (1,))), defaultdict(list)

    def widened(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    for seed in range(8):
        model = randomise(case.model(torch.bfloat16), seed)
        exact_model = case.model(torch.float64)
        exact_model.load_state_dict({name: widened(value) for name, value in model.state_dict().items()})
        inputs = case.inputs(2, torch.bfloat16)
        double = [{name: widened(value) for name, value in group.items()} for group in inputs]
        exact = case.passes(exact_model, config.skips, *double)
        plain = case.passes(model, config.skips, *inputs)
        with Denoiser(model, config) as denoiser:
            engine = outputs(denoiser.branches(*inputs))
        for branches in (exact, plain, engine):
            for name in [name for name in branches if name.startswith("skip")]:
                pairs = zip(branches["cond"], branches[name], strict=True)
                branches[f"cond - {name}"] = [cond.double() - skip.double() for cond, skip in pairs]
        for name, tensors in exact.items():
            for i, tensor in enumerate(tensors):
                errors = [(branches[name][i].double() - tensor).norm() for branches in (engine, plain)]
                ratios[name, i].append(errors[0] / errors[1])
    for key, values in ratios.items():
        ratio = torch.stack(values)
        assert ratio.mean() <= 1 + 3 * ratio.std() / len(ratio) ** 0.5, key


@references
@pytest.mark.parametrize("before", [True, False], ids=["adapter_before", "adapter_after"])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_an_adapter_on_every_linear(case, before):
    model, config = case.model(torch.float32), every_skip(case)
    inputs = case.inputs(2, torch.float32)
    in_blocks = {id(module) for block in spec_of(model).block_list(model) for module in block.modules()}
    linears = [n for n, module in model.named_modules() if id(module) in in_blocks and isinstance(module, nn.Linear)]
    lora = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=linears)
    if before:
        model.add_adapter(lora)
    with Denoiser(model, config) as denoiser:
        if not before:
            model.add_adapter(lora)
        actual = outputs(denoiser.branches(*inputs))
        assert denoiser.fusion.is_on
    assert_near(actual, case.passes(model, config.skips, *inputs))


def changed(value):
    """Not by a factor, which a norm behind would take out again."""
    return tuple(map(changed, value)) if isinstance(value, tuple) else value.abs()


def change_by_hook(module):
    module.register_forward_hook(lambda module, args, output: changed(output))


def change_by_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: changed(forward(*args, **kwargs))


def change_by_class(module):
    kind = type(module)
    members = {"forward": lambda *args, **kwargs: changed(kind.forward(*args, **kwargs))}
    module.__class__ = type("Other", (kind,), members)


def change_by_processor(module):
    kind = type(module.processor)
    members = {"__call__": lambda *args, **kwargs: changed(kind.__call__(*args, **kwargs))}
    module.processor.__class__ = type("Other", (kind,), members)


def raise_eps(module):
    module.eps = 0.5


CHANGES = {
    change_by_hook: lambda module: True,
    change_by_forward: lambda module: True,
    change_by_class: lambda module: True,
    change_by_processor: lambda module: hasattr(module, "processor"),
    raise_eps: lambda module: getattr(module, "eps", None) is not None,
}
"""What is done to a module, and to which."""


def paths_of(case, can_change):
    blocks = spec_of(model := case.model(torch.float32)).block_list(model)
    return sorted({path for block in blocks for path, module in block.named_modules() if can_change(module)})


@references
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_no_change_of_a_module_is_passed_by(case, change):
    """Every module in the first and last block, one at a time: the branches are those of the changed modules."""
    skip, inputs = Skip((1,), axis=case.axes[0]), case.inputs(1, torch.float32)
    for path in paths_of(case, CHANGES[change]):
        model = case.model(torch.float32)
        blocks = spec_of(model).block_list(model)
        for block in (blocks[0], blocks[-1]):
            if path in dict(block.named_modules()):
                change(block.get_submodule(path))
        expected = case.passes(model, config_of(skip).skips, *inputs)
        with Denoiser(model, config_of(skip)) as denoiser:
            actual = outputs(denoiser.branches(*inputs))
            assert denoiser.fusion.is_on  # in the blocks between
        for name, tensors in actual.items():
            for tensor, other in zip(tensors, expected[name], strict=True):
                assert relative_error(tensor, other) <= FP32_RELATIVE, (path, name)


@references
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_norm_weights_of_another_dtype_give_what_the_modules_give(case, dtype):
    inputs = case.inputs(1, torch.float32)
    for path in paths_of(case, lambda module: "Norm" in type(module).__name__ and "weight" in module._parameters):
        actual = {}
        model = case.model(torch.float32)
        for block in spec_of(model).block_list(model):
            if path in dict(block.named_modules()):
                block.get_submodule(path).to(dtype)
        for kernels in ("auto", "off"):
            with Denoiser(model, STGConfig(layers=(1,)), kernels=kernels) as denoiser:
                try:
                    actual[kernels] = outputs(denoiser.branches(*inputs))["cond"]
                except RuntimeError as error:  # norms of PyTorch want one dtype
                    actual[kernels] = str(error)
        if isinstance(actual["off"], str):
            assert actual["auto"] == actual["off"], path
        else:
            for tensor, other in zip(actual["auto"], actual["off"], strict=True):
                assert tensor.dtype == other.dtype, path
                assert relative_error(tensor, other) <= FP32_RELATIVE, path
