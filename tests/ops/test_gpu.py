"""On a CUDA device at true shapes: parity, bit-equal repeats, CUDA graphs, launches, compiled forms."""

import pytest
import stg_kernels
import torch
from ops.cases import assert_within_budget, widened
from stg_kernels import combine_guidance, norm_modulate
from stg_kernels.ops import FOLDERS

from benchmarks.ops import cases
from benchmarks.shapes import SHAPES

pytestmark = pytest.mark.gpu

CASES = [(shape, name) for shape in SHAPES for name in FOLDERS]
GUIDANCE = {"has_uncond": True, "rescale": True, "cfg_star": True, "dtype": torch.float32}


def case_of(shape, name, dtype=torch.bfloat16):
    return next(case for case in cases(shape, 3, dtype, torch.device("cuda")) if case.op == name)


@pytest.mark.parametrize("impl", ["fused", "native"])
@pytest.mark.parametrize(("shape", "name"), CASES, ids=lambda value: getattr(value, "model", value))
def test_true_shapes(shape, name, impl):
    if impl == "native" and "cuda" not in stg_kernels.native_devices():
        pytest.skip("csrc was not built for CUDA")
    case = case_of(shape, name)
    reference = getattr(__import__(f"stg_kernels.{FOLDERS[name]}.reference", fromlist=[name]), name)
    tokens = slice(0, 512) if name != "combine_guidance" else slice(None)  # float64 of all tokens would not fit
    actual = getattr(stg_kernels, name)(**case.arguments, impl=impl)
    part = {k: v[:, tokens] if _has_tokens(v, shape) else v for k, v in case.arguments.items()}
    low = reference(**part)
    exact = reference(**{k: widened(v) for k, v in part.items()})
    actual = tuple(a[:, tokens] for a in actual) if isinstance(actual, tuple) else actual[:, tokens]
    assert_within_budget(actual, low, exact)


def _has_tokens(value, shape):
    return isinstance(value, torch.Tensor) and value.ndim > 2 and value.shape[1] == shape.tokens


@pytest.mark.parametrize("name", FOLDERS)
def test_a_thousand_repeats_give_the_same_bits(name):
    case = case_of(SHAPES[0], name)
    call = getattr(stg_kernels, name)
    first = call(**case.arguments, impl="fused")
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        again = call(**case.arguments, impl="fused")
        pairs = zip(first, again, strict=True) if isinstance(first, tuple) else [(first, again)]
        for a, b in pairs:
            differs |= (a != b).any()
    assert not differs.item()


def test_a_captured_graph_follows_the_scales():
    rows = torch.randn(3, 6144, 128, device="cuda", dtype=torch.bfloat16)
    scales = torch.tensor([3.0, 0.7, 1.0], device="cuda")
    combine_guidance(rows, scales, **GUIDANCE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = combine_guidance(rows, scales, **GUIDANCE)
    for values in ([3.0, 0.7, 1.0], [8.0, 0.0, 4.0]):
        scales.copy_(torch.tensor(values))
        graph.replay()
        assert torch.equal(out, combine_guidance(rows, scales, **GUIDANCE))


def test_guidance_takes_two_launches_and_never_waits():
    rows = torch.randn(3, 6144, 128, device="cuda", dtype=torch.bfloat16)
    scales = torch.tensor([3.0, 0.7, 1.0], device="cuda")
    combine_guidance(rows, scales, **GUIDANCE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        combine_guidance(rows, scales, **GUIDANCE)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2


def test_other_row_and_token_counts_compile_nothing_new():
    from stg_kernels.norm_modulate import fused

    def forms():
        return sum(len(cache[0]) for cache in fused._norm_modulate_kernel.device_caches.values())

    x, scale = torch.randn(4, 4096, 2048, device="cuda"), torch.randn(4, 1, 2048, device="cuda")
    norm_modulate(x, scale, impl="fused")
    before = forms()
    for rows in (1, 2, 3, 4):
        for tokens in (1, 2, 17, 1000, 4096):
            norm_modulate(x[:rows, :tokens], scale[:rows], impl="fused")
    assert forms() == before


def test_more_than_two_to_the_31_elements():
    x = torch.ones(2, 131_072, 8200, device="cuda", dtype=torch.bfloat16)
    x[1, -1] = 3
    out = stg_kernels.residual_gate(x, x, impl="fused")
    assert out[1, -1].eq(6).all()
    assert out[0, 0].eq(2).all()
