"""On a CUDA device at true shapes: parity, bit-equal repeats, CUDA graphs, launches, compiled forms."""

import pytest
import stg_kernels
import torch
from ops.cases import assert_within_budget, widened
from stg_kernels import branch_attention, combine_guidance, norm_modulate
from stg_kernels.attention import dispatch
from stg_kernels.attention.backends import backends
from stg_kernels.attention.parts import Part, split
from stg_kernels.ops import DISPATCHED, FOLDERS

from benchmarks.ops import cases
from benchmarks.shapes import SHAPES

pytestmark = pytest.mark.gpu

NAMES = [name for name in FOLDERS if name not in DISPATCHED]
CASES = [(shape, name) for shape in SHAPES for name in NAMES]
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


@pytest.mark.parametrize("name", NAMES)
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


TRITON = [backend.name for backend in backends() if backend.name.startswith("triton/")]
PROMPT = 256  # tokens


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def integers(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def attention_of(kind, rows, tokens, heads, size):
    """Arguments of a call; prompts are shorter than their padding, the joint sequence ends with its text."""
    q = normal(rows, tokens, heads, size)
    if kind == "cross":
        lengths = integers([PROMPT - 1, 17, 0][:rows])
        return {"q": q, "k": normal(rows, PROMPT, heads, size), "v": normal(rows, PROMPT, heads, size),
                "key_lengths": lengths}  # fmt: skip
    k, v = normal(rows, tokens, heads, size), normal(rows, tokens, heads, size)
    if kind == "joint":
        own = {"own_key_rows": [rows - 1], "text": (tokens - PROMPT, tokens)}
        return {"q": q, "k": k, "v": v, "key_lengths": integers(rows * [tokens - 100]), **own}
    return {"q": q, "k": k, "v": v}


def parts_of(q, k, v, key_lengths=None, own_key_rows=(), text=None):
    return [part for *_, part in split(q, k, v, None, key_lengths, (), own_key_rows, text, q.shape[-1] ** -0.5)]


@pytest.mark.parametrize("kind", ["self", "cross", "joint"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model)
def test_attention_at_true_shapes(shape, rows, kind):
    """Every backend that can run, on sampled queries: at most twice the error of plain torch in bfloat16."""
    for part in parts_of(**attention_of(kind, rows, shape.tokens, shape.heads, shape.head_size)):
        able = [backend for backend in backends() if backend.is_exact and not backend.why_not(part)]
        assert any(backend.name in TRITON for backend in able)
        sample = dispatch.Sample(part)
        wrong = {}
        for backend in able:
            try:
                reason = sample.why_not(backend.run(part))
            except Exception as error:  # a library may refuse a device or a size in a way of its own
                reason = "" if backend.name not in TRITON else str(error)
            if reason:
                wrong[backend.name] = reason
        assert not wrong


def test_lossy_attention_is_near():
    for part in parts_of(normal(2, 1000, 8, 64), normal(2, 1000, 8, 64), normal(2, 1000, 8, 64)):
        exact = dispatch.Sample(part)
        for backend in backends():
            if not backend.is_exact and not backend.why_not(part):
                result = backend.run(part)[:, exact.at].double()
                assert torch.nn.functional.cosine_similarity(result.flatten(), exact.exact.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("kind", ["self", "cross", "joint"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_thousand_repeats_of_attention_give_the_same_bits(size, kind):
    arguments = attention_of(kind, 2, 1100, 3, size)
    for name in TRITON:
        if any(b.why_not(part) for b in backends() if b.name == name for part in parts_of(**arguments)[:1]):
            continue
        first = branch_attention(**arguments, backend=name)
        differs = torch.zeros((), dtype=torch.bool, device="cuda")
        for _ in range(1000):
            differs |= (branch_attention(**arguments, backend=name) != first).any()
        assert not differs.item(), name


@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_a_captured_graph_follows_the_key_lengths(name):
    q, k, v, lengths = normal(3, 500, 4, 64), normal(3, 256, 4, 64), normal(3, 256, 4, 64), integers([256, 7, 0])
    call = {"kv_rows": [0, 2, 1], "key_lengths": lengths, "backend": name}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        branch_attention(q, k, v, **call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = branch_attention(q, k, v, **call)
    for values in ([256, 7, 0], [1, 256, 300], [0, -3, 64]):
        lengths.copy_(integers(values))
        graph.replay()
        assert torch.equal(out, branch_attention(q, k, v, **call))
        assert_within_budget(out, *two_references(q, k, v, **call))


def two_references(q, k, v, kv_rows, key_lengths, backend):
    """Plain torch in the inputs' dtype, and float64."""
    part = Part(q, k, v, q.shape[-1] ** -0.5, tuple(kv_rows), key_lengths)
    wide = Part(*map(widened, (q, k, v)), part.scale, part.kv_rows, key_lengths)
    return dispatch.reference.attention(part, low_precision=True), dispatch.reference.attention(wide)


@pytest.mark.parametrize("kind", ["self", "cross", "joint"])
def test_attention_never_waits(kind):
    arguments = attention_of(kind, 3, 1000, 4, 64)
    if kind == "cross":
        arguments["kv_rows"] = [1, 0, 1]
    for name in ("triton", "sdpa", None):
        branch_attention(**arguments, backend=name)
        torch.cuda.set_sync_debug_mode("error")
        try:
            branch_attention(**arguments, backend=name)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", TRITON)
def test_attention_compiles_nothing_new_for_other_counts(name):
    from stg_kernels.attention import fused

    size = 256 if name.endswith("64x32") else 128 if name.endswith("128x32") else 64

    def forms():
        return sum(len(cache[0]) for cache in fused._attention_kernel.device_caches.values())

    q, k, v = (normal(4, 4096, 5, size) for _ in range(3))
    if any(b.why_not(Part(q, k, v, 1.0)) for b in backends() if b.name == name):
        pytest.skip("no such tile on this device")
    branch_attention(q, k, v, backend=name)
    before = forms()
    for rows in (1, 2, 3, 4):
        for tokens in (1, 2, 17, 1000, 4096):
            branch_attention(q[:rows, :tokens], k[:rows], v[:rows], backend=name)
            branch_attention(q[:rows], k[:rows, :tokens], v[:rows, :tokens], backend=name)
    branch_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], backend=name)
    assert forms() == before


@pytest.mark.parametrize("name", ["triton", "triton/128x32"])
def test_attention_over_more_than_two_to_the_31_elements(name):
    rows, tokens, heads, size = 6, 120_000, 24, 128
    kept = slice(tokens - 300, tokens)  # keys at the end of the memory, few of them, which is quick
    q = normal(1, tokens, heads, size).expand(rows, -1, -1, -1).contiguous()
    assert q.numel() > 2**31
    part = Part(q, q[:, kept], q[:, kept], size**-0.5)
    out = branch_attention(q, q[:, kept], q[:, kept], backend=name)
    assert dispatch.Sample(part).why_not(out) == ""
