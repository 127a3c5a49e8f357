"""Every family on a CUDA device: bfloat16 against float64, with the kernels that the device has."""

import pytest
import torch
from models.case import cases, relative_error

from stg_engine import Denoiser, Skip, STGConfig

pytestmark = pytest.mark.gpu
CASES = cases()
DEVICE = "cuda"
COPIES_LISTS = ("LTX-2", "SkyReels-V2 DF")  # to the device, in every forward: without coordinates; with frame rates


def to(device, inputs, dtype=None):
    def move(value):
        if isinstance(value, tuple):
            return tuple(map(move, value))
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("mode", ["residual", "attention"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_branches_in_bfloat16(case, mode, kernels):
    """At most twice the error of the plain passes, of every branch and of c - p."""
    skip = Skip((1,), mode=mode, axis=case.axes[-1])
    model = case.model(torch.bfloat16)
    inputs = [to("cpu", group) for group in case.inputs(2, torch.bfloat16)]
    double = case.model(torch.bfloat16).double()
    with torch.no_grad():
        exact = case.passes(double, [skip], *(to("cpu", group, torch.float64) for group in inputs))
        model.to(DEVICE)
        inputs = [to(DEVICE, group) for group in inputs]
        plain = case.passes(model, [skip], *inputs)
        config = STGConfig(layers=skip.layers, mode=mode, axis=skip.axis)
        with Denoiser(model, config, kernels=kernels) as denoiser:
            branches = denoiser.branches(*inputs)
    engine = branches if isinstance(branches, tuple) else (branches,)

    def errors(get):
        return [
            [relative_error(get(of, i).double().cpu(), get(exact, i)) for i in range(len(engine))]
            for of in ({name: [output[name] for output in engine] for name in engine[0]}, plain)
        ]

    for name in exact:
        for ours, theirs in zip(*errors(lambda of, i, name=name: of[name][i]), strict=True):
            assert ours <= 2 * theirs, name
    deltas = errors(lambda of, i: of["cond"][i].double().cpu() - of["skip"][i].double().cpu())
    for ours, theirs in zip(*deltas, strict=True):
        assert ours <= 2 * theirs


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs(case, kernels):
    """What can be captured, and that a replay has the bits of the eager engine; the rest is refused in words."""
    skip = case.skips()[0]
    model = case.model(torch.bfloat16).to(DEVICE)
    config = STGConfig(layers=skip.layers, mode=skip.mode, axis=skip.axis)
    inputs = [to(DEVICE, group) for group in case.inputs(2, torch.bfloat16)]
    with torch.no_grad():
        with Denoiser(model, config, kernels=kernels) as denoiser:
            spec, expected = denoiser.spec, denoiser(*inputs, guidance_scale=3.0)
            waits = spec.waits_in == "blocks" and not denoiser.fusion.is_everywhere
        if spec.waits_in == "forward":
            with pytest.raises(ValueError, match="waits for the device"):
                Denoiser(model, config, kernels=kernels, graph=True)
            return
        with Denoiser(model, config, kernels=kernels, graph=True) as denoiser:
            if waits or str(case) in COPIES_LISTS:
                with pytest.raises(RuntimeError, match="graph=False"):
                    denoiser(*inputs, guidance_scale=3.0)
                return
            results = [denoiser(*inputs, guidance_scale=3.0) for _ in range(3)]
            assert (denoiser.graphs.captured, denoiser.graphs.replayed) == (1, 2)
    each = [result if isinstance(result, tuple) else (result,) for result in (expected, *results)]
    assert all(map(torch.equal, each[1], each[2]))
    assert all(map(torch.equal, each[2], each[3]))
    if inputs[0]["timestep"].ndim < 2:  # timesteps of tokens: each value is embedded once without a graph
        assert all(map(torch.equal, each[0], each[1]))
