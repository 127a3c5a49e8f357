"""Ops as PyTorch sees them: schemas, fakes, torch.compile; and what the public functions refuse."""

import subprocess
import sys

import pytest
import stg_kernels
import torch
from ops.cases import DEVICE, Inputs
from stg_kernels.ops import SCHEMAS
from torch._dynamo.testing import CompileCounter


def arguments(dtype=torch.float32):
    """Per op a call with every optional tensor."""
    new = Inputs(dtype)
    x, y, table, vector = new.normal(2, 3, 16), new.normal(2, 3, 16), new.normal(2, 1, 16), new.normal(16)
    q, angles = new.normal(2, 3, 2, 8), new.normal(2, 3, 1, 4, dtype=torch.float32)
    row_map = torch.tensor([1, 0], device=DEVICE)
    keep = torch.tensor([True, False], device=DEVICE)
    rows, latents = new.normal(6, 3, 16), new.normal(2, 3, 16)
    scales, dt = torch.tensor([3.0, 0.7, 1.0], device=DEVICE), torch.tensor([-0.1], device=DEVICE)
    return {
        "combine_guidance": (rows, scales, True, True, False, True, None, latents, dt),
        "branch_attention": attention_arguments(dtype)["everything"],
        "norm_modulate": (x, table, table, vector, vector, 1e-6, True, row_map),
        "residual_gate": (x, y, table, row_map, keep),
        "residual_gate_norm_modulate": (x, y, table, table, table, vector, vector, 1e-6, False, row_map, keep),
        "qk_norm_rope": (q, q, vector, vector, vector, vector, angles, angles, 1e-6, False, True, True, row_map),
    }


def attention_arguments(dtype=torch.float32):
    """Of branch_attention, by feature; q, k and v are views into packed ones."""
    new = Inputs(dtype)
    (q, k, v), (one_k, one_v) = new.normal(3, 5, 3, 2, 16).unbind(2), new.normal(1, 4, 2, 2, 16).unbind(2)
    lengths = torch.tensor([3, 0, 5], dtype=torch.int32, device=DEVICE)
    return {
        "dense": (q, k, v),
        "one row for all": (q, one_k, one_v, None, lengths[:1]),
        "lengths": (q, k, v, None, lengths),
        "values": (q, k, v, None, None, [0, 1, 2]),
        "own keys": (q, k, v, None, None, None, [1], [2, 4]),
        "pinned": (q, k, v, [1, 1, 1], None, None, None, None, 0.3, "torch"),
        "everything": (q, k, v, [2, 0, 0], lengths, [0], [1], [0, 2], 0.3, None),
        "no queries": (q[:, :0], k, v),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name, dtype):
    op = getattr(torch.ops.stg, name).default
    torch.library.opcheck(op, arguments(dtype)[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", attention_arguments())
def test_opcheck_of_attention(name):
    """The result is contiguous, no view of an argument, and new even where it is a copy of the values."""
    call = attention_arguments(torch.bfloat16)[name]
    op = torch.ops.stg.branch_attention.default
    torch.library.opcheck(op, call, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    assert op(*call).is_contiguous()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attention_compiles_whole(backend):
    def guided(qkv, lengths):
        q, k, v = qkv.unbind(2)
        skips = {"value_rows": [2], "own_key_rows": (1,), "text": (0, 2)}
        mixed = stg_kernels.branch_attention(q, k, v, **skips, key_lengths=lengths)
        shared = stg_kernels.branch_attention(mixed, k[:1], v[:1], scale=0.5, backend="torch")
        return stg_kernels.branch_attention(shared, k, v, kv_rows=[0, 0, 1])

    compiled = torch.compile(guided, backend=backend, fullgraph=True, dynamic=True)
    new = Inputs(torch.bfloat16)
    for tokens in (5, 9):
        call = new.normal(3, tokens, 3, 2, 16), torch.tensor([3, 5, 1], dtype=torch.int32, device=DEVICE)
        assert torch.equal(compiled(*call), guided(*call))


def test_guidance_dtypes_of_fakes():
    new = Inputs(torch.bfloat16)
    rows, scales = new.normal(3, 4, 8), torch.ones(3, device=DEVICE)
    for dtype, latents in ((None, None), (torch.float32, None), (None, new.normal(1, 4, 8, dtype=torch.float16))):
        dt = None if latents is None else torch.ones(1, device=DEVICE)
        call = (rows, scales, True, False, False, False, dtype, latents, dt)
        torch.library.opcheck(
            torch.ops.stg.combine_guidance.default, call, test_utils=("test_schema", "test_faketensor")
        )


def test_compiles_whole_and_does_not_compile_again_for_other_sizes():
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def block(x, y, gate):
        h, normed = stg_kernels.residual_gate_norm_modulate(x, y, gate, gate, gate)
        q = stg_kernels.norm_modulate(normed).unflatten(-1, (2, -1))
        return h, *stg_kernels.qk_norm_rope(q, q)

    new = Inputs(torch.float32)
    for rows, tokens in ((2, 5), (3, 5), (4, 7), (3, 11)):
        call = (new.normal(rows, tokens, 16), new.normal(rows, tokens, 16), new.normal(rows, 1, 16))
        for actual, expected in zip(block(*call), block._torchdynamo_orig_callable(*call), strict=True):
            assert torch.equal(actual, expected)
    assert counter.frame_count == 1


def test_a_row_map_does_not_break_the_graph():
    compiled = torch.compile(stg_kernels.norm_modulate, backend="eager", fullgraph=True)
    x, row_map = torch.ones(2, 3, 8), torch.tensor([0, 0])
    assert torch.equal(compiled(x, x[:1], row_map=row_map), stg_kernels.norm_modulate(x, x[:1], row_map=row_map))


X = torch.ones(2, 3, 8)
Q = torch.ones(2, 3, 2, 4)
ROWS, SCALES = torch.ones(3, 4, 8), torch.ones(3)
WRONG = [
    (lambda: stg_kernels.norm_modulate(X.double(), impl="fusd"), ValueError, "impl='fusd' is not allowed"),
    (lambda: stg_kernels.norm_modulate(X, eps="1"), TypeError, "eps='1' is not allowed; it must be a number"),
    (lambda: stg_kernels.norm_modulate(None), TypeError, "x=None is not allowed; it must be a tensor"),
    (lambda: stg_kernels.norm_modulate(X, X, row_map=[0, 1]), TypeError, r"row_map=\[0, 1\] is not allowed"),
    (lambda: stg_kernels.residual_gate(X, None), TypeError, "y=None is not allowed"),
    (lambda: stg_kernels.residual_gate(X, X, pass_through=[True, False]), TypeError, "pass_through=.* be a tensor"),
    (lambda: stg_kernels.residual_gate(X[0], X[0]), ValueError, r"x has shape \(3, 8\); it must be \[R, S, C\]"),
    (lambda: stg_kernels.qk_norm_rope(Q, None), TypeError, "k=None is not allowed"),
    (lambda: stg_kernels.qk_norm_rope(Q, Q, cos=[1.0], sin=[1.0]), TypeError, r"cos=\[1.0\] is not allowed"),
    (lambda: stg_kernels.qk_norm_rope(X, X), ValueError, r"it must be \[R, S, N, D\]"),
    (lambda: stg_kernels.combine_guidance(ROWS, None, has_uncond=True), TypeError, "scales=None is not allowed"),
    *(
        (
            lambda dtype=dtype, impl=impl: stg_kernels.combine_guidance(
                ROWS, SCALES, has_uncond=True, dtype=dtype, impl=impl
            ),
            ValueError,
            f"dtype={dtype} is not allowed with rows of torch.float32; it must be one of torch.float32, ",
        )
        for dtype in (torch.float64, torch.int32)
        for impl in (None, "reference", "fused", "native")
    ),
    (
        lambda: stg_kernels.combine_guidance(
            ROWS, SCALES, has_uncond=True, latents=ROWS[:1].double(), dt=torch.ones(1)
        ),
        ValueError,
        "latents.dtype=torch.float64 is not allowed",
    ),
    (lambda: stg_kernels.norm_modulate(X.int()), ValueError, "x has dtype torch.int32; it must be a floating point"),
    (lambda: stg_kernels.norm_modulate(X.double(), impl="fused"), ValueError, "float64 has no impl='fused'"),
    (lambda: stg_kernels.norm_modulate(X, eps=-1.0), ValueError, "eps=-1.0 is not allowed"),
    (
        lambda: stg_kernels.norm_modulate(X, X, row_map=torch.tensor([0, 9])),
        ValueError,
        "row_map holds 0 to 9; .* 0 to 1",
    ),
    (lambda: stg_kernels.norm_modulate(X[0]), ValueError, r"x has shape \(3, 8\)"),
    (lambda: stg_kernels.norm_modulate([1.0]), TypeError, r"x=\[1.0\] is not allowed; it must be a tensor"),
    (
        lambda: stg_kernels.norm_modulate(X, X[:, :2]),
        ValueError,
        r"scale has shape \(2, 2, 8\); it must be \[2 or 1, 3 or 1, 8\]",
    ),
    (
        lambda: stg_kernels.norm_modulate(X, weight=torch.ones(7)),
        ValueError,
        r"weight has shape \(7,\); it must be \[8\]",
    ),
    (lambda: stg_kernels.norm_modulate(X, weight=torch.ones(8).half()), ValueError, "weight has dtype torch.float16"),
    (lambda: stg_kernels.norm_modulate(X.mT), ValueError, "x has stride 8 in its last dimension"),
    (lambda: stg_kernels.norm_modulate(X.to("meta"), X), ValueError, "scale is on cpu; it must be on meta"),
    (lambda: stg_kernels.norm_modulate(X, X, row_map=torch.ones(2)), ValueError, r"it must be int64 \[2\] on cpu"),
    (
        lambda: stg_kernels.norm_modulate(X, impl="cuda"),
        ValueError,
        "impl='cuda' is not allowed; choose one of None, 'ref",
    ),
    (lambda: stg_kernels.residual_gate(X, X.half()), ValueError, "y has dtype torch.float16"),
    (lambda: stg_kernels.residual_gate(X, X[:1]), ValueError, r"y has shape \(1, 3, 8\); it must be \[2, 3, 8\]"),
    (lambda: stg_kernels.residual_gate(X, X, pass_through=torch.ones(2)), ValueError, r"it must be bool \[2\] on cpu"),
    (lambda: stg_kernels.qk_norm_rope(Q, Q[:, :2]), ValueError, r"k is torch.float32 \(2, 2, 2, 4\); it must be"),
    (lambda: stg_kernels.qk_norm_rope(Q[..., :3], Q[..., :3]), ValueError, "stride 4 between heads|head size 3"),
    (lambda: stg_kernels.qk_norm_rope(Q, Q, cos=torch.ones(1, 3, 1, 2)), ValueError, "cos and sin go together"),
    (lambda: stg_kernels.qk_norm_rope(Q, Q, cos=Q, sin=Q), ValueError, r"cos has shape \(2, 3, 2, 4\); it must be"),
    (
        lambda: stg_kernels.qk_norm_rope(Q, Q, cos=torch.ones(2, 3, 1, 2), sin=torch.ones(1, 3, 2, 2)),
        ValueError,
        r"sin has shape \(1, 3, 2, 2\); it must be \(2, 3, 1, 2\), as cos",
    ),
    (
        lambda: stg_kernels.qk_norm_rope(Q, Q, q_weight=torch.ones(4)),
        ValueError,
        r"q_weight has shape \(4,\); it must be \[8\]",
    ),
    (
        lambda: stg_kernels.combine_guidance(ROWS, SCALES.double(), has_uncond=True),
        ValueError,
        "scales is torch.float64",
    ),
    (lambda: stg_kernels.combine_guidance(ROWS[:2], SCALES, has_uncond=True), ValueError, "with K = 3"),
    (lambda: stg_kernels.combine_guidance(ROWS.mT, SCALES, has_uncond=True), ValueError, "must be contiguous"),
    (
        lambda: stg_kernels.combine_guidance(ROWS, SCALES[:2], has_uncond=False, cfg_star=True),
        ValueError,
        "needs uncond",
    ),
    (lambda: stg_kernels.combine_guidance(ROWS, SCALES, has_uncond=True, latents=ROWS[:1]), ValueError, "go together"),
]


LENGTHS = torch.ones(2, dtype=torch.int32)
HERE = r"must be int32 \[2\] on cpu"
WRONG_ATTENTION = [
    ({"q": [1.0]}, TypeError, r"q=\[1.0\] is not allowed; it must be a tensor"),
    ({"v": Q.int()}, ValueError, "v has dtype torch.int32; it must be a floating point"),
    (
        {"q": Q.to(torch.float8_e5m2)},
        ValueError,
        "q has dtype torch.float8_e5m2; it must be float32, bfloat16, float16",
    ),
    ({"q": Q[0]}, ValueError, r"q has shape \(3, 2, 4\); it must be \[R, S, N, D\]"),
    ({"k": Q[0]}, ValueError, r"k has shape \(3, 2, 4\); it must be \[T, K, 2, 4\]"),
    ({"k": Q[:, :, :1]}, ValueError, r"k has shape \(2, 3, 1, 4\); it must be \[T, K, 2, 4\]"),
    ({"v": Q[:, :2]}, ValueError, r"v has shape \(2, 2, 2, 4\); it must be \[T, K, 2, 4\] as k and v"),
    ({"k": Q.half()}, ValueError, "k is torch.float16 on cpu; it must be torch.float32 on cpu, as q is"),
    ({"v": Q.to("meta")}, ValueError, "v is torch.float32 on meta; it must be torch.float32 on cpu"),
    ({"q": Q.mT.contiguous().mT}, ValueError, "q has stride 2 in its last dimension; it must be 1"),
    (
        {"k": torch.ones(3, 3, 2, 4), "v": torch.ones(3, 3, 2, 4)},
        ValueError,
        "k has 3 rows; .* must have 2, as q, or 1",
    ),
    ({"kv_rows": [0]}, ValueError, r"kv_rows=\[0\] is not allowed; it must have one entry per row of q, 2"),
    ({"kv_rows": [0, 2]}, ValueError, r"kv_rows=\[0, 2\] is not allowed; it must be integers from 0 to 1"),
    ({"kv_rows": [0, -1]}, ValueError, r"kv_rows=\[0, -1\] is not allowed"),
    ({"kv_rows": 1}, ValueError, "kv_rows=1 is not allowed; it must be integers from 0 to 1"),
    ({"key_lengths": [1, 2]}, TypeError, r"key_lengths=\[1, 2\] is not allowed; it must be a tensor"),
    ({"own_key_rows": [1], "text": slice(0, 1)}, ValueError, r"text=slice\(0, 1, None\) is not allowed"),
    ({"key_lengths": LENGTHS.long()}, ValueError, f"key_lengths is torch.int64 .2,. on cpu; it {HERE}"),
    ({"key_lengths": LENGTHS[:1]}, ValueError, f"key_lengths is torch.int32 .1,. on cpu; it {HERE}"),
    ({"key_lengths": LENGTHS.to("meta")}, ValueError, f"key_lengths is torch.int32 .2,. on meta; it {HERE}"),
    ({"value_rows": [2]}, ValueError, r"value_rows=\[2\] is not allowed; it must be integers from 0 to 1"),
    ({"own_key_rows": [1.0], "text": (0, 1)}, ValueError, r"own_key_rows=\[1.0\] is not allowed"),
    (
        {"own_key_rows": [1], "value_rows": [1]},
        ValueError,
        r"own_key_rows=\[1\] is not allowed; value_rows=\[1\] must be",
    ),
    ({"value_rows": [1], "q": Q[:, :2]}, ValueError, "k has 3 tokens; with value_rows or own_key_rows it must have 2"),
    ({"own_key_rows": [1]}, ValueError, r"text=None and own_key_rows=\[1\] go together"),
    ({"text": (0, 1)}, ValueError, r"text=\(0, 1\) and own_key_rows=\[\] go together"),
    (
        {"own_key_rows": [1], "text": (0, 4)},
        ValueError,
        r"text=\(0, 4\) is not allowed; it must be integers from 0 to 3",
    ),
    ({"own_key_rows": [1], "text": (2, 1)}, ValueError, r"text=\(2, 1\) is not allowed"),
    ({"own_key_rows": [1], "text": (0, 1, 2)}, ValueError, r"text=\(0, 1, 2\) is not allowed"),
    ({"scale": 0.0}, ValueError, "scale=0.0 is not allowed; it must be a finite number above 0"),
    ({"scale": float("inf")}, ValueError, "scale=inf is not allowed"),
    ({"scale": float("nan")}, ValueError, "scale=nan is not allowed"),
    ({"backend": "cuda"}, ValueError, "attention backend 'cuda' is not allowed; choose from sdpa, sdpa/cudnn"),
    ({"backend": "sdpa/cudnn"}, RuntimeError, "'sdpa/cudnn' cannot run .*CUDNN_ATTENTION is for CUDA tensors"),
]


@pytest.mark.parametrize(("given", "kind", "message"), WRONG_ATTENTION, ids=range(len(WRONG_ATTENTION)))
def test_wrong_arguments_of_attention(given, kind, message):
    with pytest.raises(kind, match=message):
        stg_kernels.branch_attention(**{"q": Q, "k": Q, "v": Q} | given)


@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("name", ["norm_modulate", "residual_gate", "residual_gate_norm_modulate"])
def test_results_are_contiguous(name):
    x = torch.randn(3, 4, 16, device=DEVICE).transpose(0, 1)
    call = (x,) if name == "norm_modulate" else (x, x)
    torch.library.opcheck(getattr(torch.ops.stg, name).default, call, test_utils=("test_schema", "test_faketensor"))


def test_a_result_is_no_view_of_the_rows():
    rows = torch.ones(1, 3, 8, device=DEVICE)
    call = (rows, torch.ones(2, device=DEVICE), False)
    torch.library.opcheck(torch.ops.stg.combine_guidance.default, call, test_utils=("test_schema",))


def test_gradients_are_refused():
    x = X.clone().requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="norm_modulate has no gradients"):
        stg_kernels.norm_modulate(x)
    q = Q.clone().requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="branch_attention has no gradients"):
        stg_kernels.branch_attention(Q, Q, q)
    with torch.no_grad():
        assert not stg_kernels.branch_attention(Q, Q, q).requires_grad
        assert not stg_kernels.norm_modulate(x).requires_grad


def test_float64_runs_the_reference():
    x = X.double() * torch.arange(1, 9)
    assert stg_kernels.norm_modulate(x).dtype == torch.float64
    assert torch.equal(stg_kernels.norm_modulate(x), stg_kernels.norm_modulate(x, impl="reference"))
    q = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    assert torch.equal(
        stg_kernels.branch_attention(q, q, q), stg_kernels.branch_attention(q, q, q, backend="reference")
    )
    assert stg_kernels.branch_attention(q, q, q, backend="torch").dtype == torch.float64


def test_import_is_light():
    """Triton and the reference of an op are loaded when the op runs."""
    code = "import sys, stg_kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "triton" not in loaded
    assert not [name for name in loaded if name.startswith("stg_kernels.") and name.endswith((".reference", ".fused"))]
