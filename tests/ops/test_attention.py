"""branch_attention against its reference in float64: Triton (a CUDA device or the interpreter), SDPA, plain torch."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.cases import DEVICE, DTYPES, Inputs, assert_within_budget, widened
from stg_kernels import branch_attention
from stg_kernels.attention import reference
from stg_kernels.attention.parts import Part, split

fused = pytest.importorskip("stg_kernels.attention.fused", reason="Triton is not installed", exc_type=ImportError)

TOKENS, SIZES = (1, 2, 63, 129, 257), (16, 40, 64, 128, 256)
BACKENDS = ("triton", "sdpa", "torch")
LAYOUTS = {
    "contiguous": lambda new, *shape: new.normal(*shape),
    "packed": lambda new, rows, tokens, heads, size: new.normal(rows, tokens, 3, heads, size)[:, :, 1],
    "heads first": lambda new, rows, tokens, heads, size: new.normal(rows, heads, tokens, size).transpose(1, 2),
    "odd offsets": lambda new, *shape: new.normal(*shape),
}


pytestmark = pytest.mark.usefixtures("poisoned")


def integers(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def inputs(dtype, rows, tokens, heads=2, size=16, *, sources=None, keys=None, layout="contiguous"):
    new, make = Inputs(dtype, strided=layout == "odd offsets"), LAYOUTS[layout]
    sources, keys = rows if sources is None else sources, tokens if keys is None else keys
    return make(new, rows, tokens, heads, size), *(make(new, sources, keys, heads, size) for _ in range(2))


def in_low_precision(q, k, v, **features):
    """Plain torch in the inputs' dtype, part by part."""
    given = dict.fromkeys(("kv_rows", "key_lengths", "text")) | {"value_rows": (), "own_key_rows": ()} | features
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    for rows, queries, part in split(q, k, v, **{"scale": q.shape[-1] ** -0.5} | given):
        is_part = isinstance(part, Part)
        out[rows, queries] = reference.attention(part, low_precision=True) if is_part else part
    return out


def can_run(backend, dtype):
    return not (DEVICE == "cuda" and dtype == torch.float32 and backend.startswith("triton"))


def check(tensors, features, backends=BACKENDS, given=None):
    """The op on `given`, if it is not `tensors` themselves, against the reference on `tensors`."""
    q, k, v = tensors
    exact = reference.branch_attention(*map(widened, tensors), **features)
    low = in_low_precision(q, k, v, **features)
    for backend in backends:
        if can_run(backend, q.dtype):
            actual = branch_attention(*(given or tensors), **features, backend=backend)
            assert actual.is_contiguous()
            assert actual.dtype == q.dtype
            assert_within_budget(actual, low, exact)


def configs_for(q, k, v):
    part = Part(q, k, v, 1.0)
    return [f"triton/{name}" for name in fused.NAMES if not fused.why_not(part, name)]


@pytest.mark.parametrize(("a", "b"), [*product(range(5), range(5))])
def test_lengths_head_sizes_and_dtypes(a, b):
    """Every pair of token counts, and each of them with every head size; tile sizes in turn.

    A few tokens have many heads: the largest error of few numbers is a matter of luck, in plain torch too.
    """
    tensors = inputs(
        DTYPES[(2 * a + b) % 3], 1 + a % 2, TOKENS[a], (16, 8, 2, 1, 1)[a], SIZES[(a + b + 2) % 5], keys=TOKENS[b],
        layout=[*LAYOUTS][(a + 2 * b) % 4],
    )  # fmt: skip
    configs = configs_for(*tensors) or ["triton"]
    check(tensors, {}, (configs[b % len(configs)], "sdpa", "torch"))


@pytest.mark.parametrize("size", sorted({16, 32, *SIZES}))
@pytest.mark.parametrize("name", fused.NAMES)
def test_every_tile_size(name, size):
    q, k, v = inputs(torch.bfloat16, 2, 129, 1, size, sources=3, keys=130)
    if fused.why_not(Part(q, k, v, 1.0), name):
        with pytest.raises(RuntimeError, match=f"triton/{name}: (it has no such config|tensor descriptors|it is not)"):
            branch_attention(q, k, v, kv_rows=[1, 0], backend=f"triton/{name}")
        return
    features = {"kv_rows": [2, 0], "key_lengths": integers([129, 0, 67])}
    check((q, k, v), features, [f"triton/{name}"])


FEATURES = {  # rows of q, rows of k and v, and the rest; 129 tokens
    "all keys": (2, 2, {}),
    "a scale": (2, 2, {"scale": 0.7}),
    "one row for all": (3, 1, {}),
    "rows shared": (4, 2, {"kv_rows": [0, 1, 1, 0]}),
    "rows permuted": (3, 3, {"kv_rows": [2, 0, 1]}),
    "one row of many": (2, 3, {"kv_rows": [1, 1]}),
    "a run of rows": (2, 3, {"kv_rows": [1, 2]}),
    "lengths": (4, 4, {"key_lengths": [0, 1, 64, 1000]}),
    "lengths below 0": (2, 2, {"key_lengths": [-5, 65]}),
    "lengths of shared rows": (3, 2, {"kv_rows": [1, 0, 1], "key_lengths": [5, 66]}),
    "lengths of one row for all": (2, 1, {"key_lengths": [33]}),
    "values": (3, 3, {"value_rows": [1]}),
    "values alone": (2, 2, {"value_rows": [0, 1]}),
    "values of shared rows": (4, 3, {"kv_rows": [2, 2, 0, 1], "value_rows": [3, 0]}),
    "values of one row for all": (3, 1, {"value_rows": [0, 2]}),
    "text first": (2, 2, {"own_key_rows": [1], "text": (0, 17)}),
    "text within": (3, 3, {"own_key_rows": [0, 2], "text": (40, 111)}),
    "text last": (3, 1, {"own_key_rows": [1, 2], "text": (112, 129)}),
    "no text": (2, 2, {"own_key_rows": [0], "text": (64, 64)}),
    "text alone": (1, 1, {"own_key_rows": [0], "text": (0, 129)}),
    "text with a length": (2, 2, {"own_key_rows": [0, 1], "text": (0, 70), "key_lengths": [66, 0]}),
    "everything": (
        4,
        3,
        {
            "kv_rows": [0, 2, 1, 2],
            "key_lengths": [129, 70, 121],
            "value_rows": [3],
            "own_key_rows": [1, 2],
            "text": (100, 129),
            "scale": 0.2,
        },
    ),
}


def of(name):
    """Features as arguments."""
    rows, sources, features = FEATURES[name]
    if "key_lengths" in features:
        features = features | {"key_lengths": integers(features["key_lengths"])}
    return rows, sources, features


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, dtype):
    turn = [*FEATURES].index(name) + DTYPES.index(dtype)
    rows, sources, features = of(name)
    size, layout = (16, 40, 64)[turn % 3], [*LAYOUTS][turn % 4]
    tensors = inputs(dtype, rows, 129, 2, size, sources=sources, layout=layout)
    tiles = [
        name for name in configs_for(*tensors) if "64x64" in name
    ]  # by pointers; by descriptors too where they fit
    check(tensors, features, (tiles[turn % len(tiles)], "sdpa", "torch"))


def test_the_reference_is_masked_sdpa():
    """The specification by another hand: one query at a time, from the op's description."""
    rows, sources, features = of("everything")
    q, k, v = (x.double() for x in inputs(torch.float32, rows, 129, sources=sources))
    actual = reference.branch_attention(q, k, v, **features)
    start, stop = features["text"]
    for row, source in enumerate(features["kv_rows"]):
        if row in features["value_rows"]:
            assert torch.equal(actual[row], v[source])
            continue
        length = features["key_lengths"][source].item()
        for token in range(129):
            keys = set(range(length))
            if row in features["own_key_rows"] and not start <= token < stop:
                keys = keys & set(range(start, stop)) | {token}
            heads = (x[:, sorted(keys)] for x in (k[source].transpose(0, 1), v[source].transpose(0, 1)))
            one = torch.nn.functional.scaled_dot_product_attention(q[row, token, :, None], *heads, scale=0.2)
            torch.testing.assert_close(actual[row, token], one[:, 0])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "triton/tma-64x64"])
def test_what_lies_beyond_a_length_never_counts(backend, dtype):
    lengths = [70, 0, 129, 64]
    clean = inputs(dtype, 4, 129)
    q, k, v = (x.clone() for x in clean)
    for row, length in enumerate(lengths):
        k[row, length:], v[row, length:] = torch.nan, torch.inf
        k[row, length + 1 :: 2], v[row, length + 1 :: 2] = -torch.inf, torch.nan
    text = {"own_key_rows": [0, 3], "text": (60, 129)}
    for features in ({}, {"kv_rows": [3, 2, 1, 0]}, text):
        features = features | {"key_lengths": integers(lengths)}
        check(clean, features, [backend], given=(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_give_zeros(backend):
    q, k, v = inputs(torch.bfloat16, 3, 65, sources=1)
    assert branch_attention(q, k, v, key_lengths=integers([0]), backend=backend).eq(0).all()
    assert branch_attention(q, k[:, :0], v[:, :0], backend=backend).eq(0).all()
    mixed = branch_attention(q, *(x.expand(3, -1, -1, -1) for x in (k, v)), key_lengths=integers([9, 0, -1]))
    assert mixed[1:].eq(0).all()
    assert mixed[0].ne(0).any()
    for empty in (q[:0], q[:, :0]):
        assert branch_attention(empty, k, v, backend=backend).shape == empty.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_lengths_need_not_be_contiguous(backend):
    tensors = inputs(torch.bfloat16, 3, 66)
    for lengths in (integers([7, 0, 50, 1, 66, 3])[::2], integers([9]).expand(3)):
        check(tensors, {"key_lengths": lengths}, [backend])


@pytest.mark.parametrize("backend", ["triton", "triton/64x64", "sdpa", "torch"])
@pytest.mark.parametrize("name", ["all keys", "rows permuted", "lengths", "values", "text within", "no text"])
def test_a_row_does_not_depend_on_the_batch(name, backend):
    q, k, v = inputs(torch.bfloat16, 3, 129, 1)
    _, _, features = of(name)
    lengths = integers([11, 129, 64]) if "key_lengths" in features else None
    skips = {skip: features.get(skip, []) for skip in ("value_rows", "own_key_rows")}
    text = features.get("text")
    rows = features.get("kv_rows", range(3))
    together = branch_attention(q, k, v, kv_rows=rows, key_lengths=lengths, **skips, text=text, backend=backend)
    for row, source in enumerate(rows):
        alone = {skip: [0] if row in members else [] for skip, members in skips.items()}
        keys = {"key_lengths": None if lengths is None else lengths[source : source + 1]}
        keys |= {"text": text if alone["own_key_rows"] else None}
        kept = (q[row : row + 1], *(x[source : source + 1] for x in (k, v)))
        assert torch.equal(together[row], branch_attention(*kept, **alone, **keys, backend=backend)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_rows", [None, [2, 0, 0]], ids=str)
def test_value_rows_are_copied_bit_for_bit(kv_rows, dtype):
    q, k, v = inputs(dtype, 3, 5)
    special = torch.tensor([torch.nan, torch.inf, -0.0, torch.finfo(dtype).smallest_normal / 2])
    v[:, 0, 0, :4] = special.to(v)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    out = branch_attention(q, k, v, kv_rows=kv_rows, value_rows=[0, 2], backend="sdpa")
    expected = v if kv_rows is None else v[kv_rows]
    assert torch.equal(out[::2].contiguous().view(bits), expected[::2].contiguous().view(bits))
    assert branch_attention(q, k, v, value_rows=[0, 1, 2]).data_ptr() != v.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_sees_whom(backend):
    """Tokens that a change of one key and value reaches: text all, others their own; in other rows everyone."""
    q, k, v = inputs(torch.bfloat16, 2, 70)
    features = {"own_key_rows": [1], "text": (20, 30), "backend": backend}
    before = branch_attention(q, k, v, **features)
    for token, reached in ((5, {5, *range(20, 30)}), (25, set(range(70))), (69, {69, *range(20, 30)})):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, token], other_v[:, token] = 0, 50
        changed = branch_attention(q, other_k, other_v, **features).ne(before).any(-1).any(-1)
        for row, expected in ((0, set(range(70))), (1, reached)):
            assert set(changed[row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype):
    q, k, v = inputs(dtype, 2, 129)
    check((q * 100, k, v), {})
    check((q, k, v), {"scale": 100.0})
    check((-q.abs() * 100, k.abs(), v), {"key_lengths": integers([129, 3])})  # every score far below 0
    check((q, k[:, :1].expand_as(k), v), {})
    check((torch.zeros_like(q), k, torch.ones_like(v)), {"own_key_rows": [1], "text": (3, 70)})


def test_every_score_may_be_the_largest():
    """A running maximum that rises in every tile, and one that falls."""
    q, k, v = inputs(torch.float32, 1, 257)
    rising = torch.linspace(0, 40, 257, device=DEVICE)[None, :, None, None] + k
    for keys in (rising, rising.flip(1).contiguous()):
        check((q.abs(), keys, v), {})


def rows_of_kinds(draw):
    rows, sources = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kinds = draw(st.lists(st.sampled_from(("all", "value", "own")), min_size=rows, max_size=rows))
    mapped = sources not in (rows, 1) or draw(st.booleans())
    kv_rows = draw(st.lists(st.integers(0, sources - 1), min_size=rows, max_size=rows)) if mapped else None
    start = draw(st.integers(0, 6))
    return rows, sources, kinds, kv_rows, (start, draw(st.integers(start, 6)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.composite(rows_of_kinds)(), st.booleans())
def test_parts_are_every_row_and_query_once(case, has_lengths):
    rows, sources, kinds, kv_rows, text = case
    q, k = torch.arange(rows * 6.0).view(rows, 6, 1, 1), torch.arange(sources * 6.0).view(sources, 6, 1, 1)
    v = k + 1
    lengths = torch.arange(sources, dtype=torch.int32) if has_lengths else None
    skips = [[row for row, kind in enumerate(kinds) if kind == skip] for skip in ("value", "own")]
    seen = torch.zeros(rows, 6, dtype=torch.int)
    for at, queries, part in split(q, k, v, kv_rows, lengths, *skips, text if skips[1] else None, 1.0):
        seen[at, queries] += 1
        members = range(rows)[at]
        read = [kv_rows[row] if kv_rows else row if sources == rows else 0 for row in members]
        if not isinstance(part, Part):
            assert {kinds[row] for row in members} == {"value"}
            assert torch.equal(part.expand(len(members), -1, -1, -1), v[read])
            continue
        assert torch.equal(part.q, q[at, queries])
        for of_part, tensor in ((part.q, q), (part.k, k), (part.v, v), (part.own_k, k), (part.own_v, v)):
            assert of_part is None or of_part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        own = range(part.q.shape[0]) if part.kv_rows is None else part.kv_rows
        assert len(part.k) == len(part.v) == (len(part.q) if part.kv_rows is None else len(part.k))
        keys = k[read] if part.own_k is None else k[read, text[0] : text[1]]
        assert torch.equal(part.k[list(own)], keys)
        assert lengths is None or torch.equal(part.key_lengths[list(own)], lengths[read])
        assert part.key_start == (0 if part.own_k is None else text[0])
        assert part.own_k is None or torch.equal(part.own_k[list(own)], k[read][:, queries])
        is_text = [text[0] <= token < text[1] for token in range(6)[queries]]
        assert (part.own_k is not None) == ("own" in {kinds[row] for row in members} and not any(is_text))
    assert seen.eq(1).all()


def test_a_plain_call_is_one_part():
    q, k, v = inputs(torch.float32, 3, 5)
    ((rows, queries, part),) = split(q, k, v, None, None, (), (), None, 1.0)
    assert (rows, queries, part.kv_rows, part.features) == (slice(0, 3), slice(None), None, "dense")
    assert [x.data_ptr() for x in (part.q, part.k, part.v)] == [x.data_ptr() for x in (q, k, v)]
    ((_, _, part),) = split(q, k[:1], v[:1], None, None, (), (), None, 1.0)
    assert part.shared_row
    assert part.features == "shared keys"


def test_autocast_changes_nothing():
    q = torch.randn(1, 5, 2, 16)
    expected = branch_attention(q, q, q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in (None, "torch", "reference"):
            actual = branch_attention(q, q, q, backend=backend)
            assert actual.dtype == torch.float32
            assert (actual - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps
