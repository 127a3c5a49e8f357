"""csrc, as torch.ops.stg.<op>_native, against the references in float64; which bits a result may depend on."""

import pytest
import stg_kernels
import torch
from ops.cases import DEVICE, DTYPES, Inputs, all_residual_arguments, assert_within_budget, far_uncond, widened
from stg_kernels.combine_guidance import reference as combine_guidance_reference
from stg_kernels.norm_modulate import reference as norm_modulate_reference
from stg_kernels.qk_norm_rope import reference as qk_norm_rope_reference
from stg_kernels.residual_gate import reference as residual_gate_reference

if DEVICE not in stg_kernels.native_devices():
    pytest.skip(f"stg_kernels._C was not built for {DEVICE}", allow_module_level=True)

REFERENCES = {
    "combine_guidance": combine_guidance_reference.combine_guidance,
    "norm_modulate": norm_modulate_reference.norm_modulate,
    "residual_gate": residual_gate_reference.residual_gate,
    "residual_gate_norm_modulate": residual_gate_reference.residual_gate_norm_modulate,
    "qk_norm_rope": qk_norm_rope_reference.qk_norm_rope,
}

# 4,097 channels are more than the CPU keeps widened, 520 more than one chunk.
SHAPES = [(1, 1, 1), (2, 3, 40), (3, 5, 64), (1, 7, 2), (2, 1, 129), (3, 2, 520), (1, 2, 4097)]


def native(name, **arguments):
    """Outputs are NaN until they are written: tests/conftest.py has torch fill uninitialized memory."""
    return getattr(torch.ops.stg, f"{name}_native")(**arguments)


def check(name, **arguments):
    wide = {key: widened(value) for key, value in arguments.items()}
    reference = REFERENCES[name]
    assert_within_budget(native(name, **arguments), reference(**arguments), reference(**wide))


def norm_arguments(new, rows, tokens, channels, *, mixed=False):
    """Every optional tensor, in x's dtype or, if `mixed`, half of them in float32."""
    other = torch.float32 if mixed else None
    return {
        "x": new.normal(rows, tokens, channels),
        "scale": new.normal(rows, 1, channels),
        "shift": new.normal(1, tokens, channels, dtype=other),
        "weight": new.normal(channels, dtype=other),
        "bias": new.normal(channels),
    }


def rope_arguments(new, rows, tokens, heads, size, *, per_head=False):
    normed = size if per_head else heads * size
    q, k = (new.normal(rows, tokens, heads * size).unflatten(-1, (heads, size)) for _ in range(2))
    angles = Inputs(torch.float32).normal(rows, tokens, heads, size // 2)
    return {
        "q": q,
        "k": k,
        "q_weight": new.normal(normed),
        "k_weight": new.normal(normed, dtype=torch.float32),
        "q_bias": new.normal(normed, dtype=torch.float32),
        "k_bias": new.normal(normed),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def guidance_arguments(new, videos, size, skips, *, has_uncond=True, **options):
    base = new.normal(videos, *size) + 0.5
    rows = torch.cat([base + 0.1 * new.normal(videos, *size) for _ in range(1 + skips + has_uncond)])
    scales = torch.tensor([8.0, 0.7, 1.5, 0.5, 4.0][: 2 + skips], device=DEVICE)
    return {"rows": rows, "scales": scales, "has_uncond": has_uncond, **options}


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(actual, expected):
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (actual, expected)), strict=True):
        wrong = (bits(a) != bits(b)).nonzero()
        assert not len(wrong), f"{len(wrong)} differ, the first at {wrong[0].tolist()}"


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("subtract_mean", [False, True], ids=["rms", "layer"])
def test_norm_modulate(shape, dtype, strided, subtract_mean):
    new = Inputs(dtype, strided=strided)
    for mixed in (False, True):
        check("norm_modulate", **norm_arguments(new, *shape, mixed=mixed), subtract_mean=subtract_mean)
    check("norm_modulate", x=new.normal(*shape), bias=new.normal(shape[-1]), eps=1e-2)
    check("norm_modulate", x=new.normal(*shape), scale=new.normal(1, 1, shape[-1]), subtract_mean=subtract_mean)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_gate(shape, dtype, strided):
    new = Inputs(dtype, strided=strided)
    y, gates = (
        new.normal(*shape),
        [None, new.normal(1, *shape[1:]), new.normal(shape[0], 1, shape[2], dtype=torch.float32)],
    )
    for gate in gates:
        arguments = norm_arguments(new, *shape) | {"y": y, "gate": gate}
        check("residual_gate", x=arguments["x"], y=y, gate=gate)
        check("residual_gate_norm_modulate", **arguments)


@pytest.mark.parametrize("subtract_mean", [False, True], ids=["rms", "layer"])
def test_residual_gate_with_all_arguments(subtract_mean):
    """A gate of every token beside a scale and shift of every row among them."""
    arguments = all_residual_arguments(Inputs(torch.float32))
    check("residual_gate_norm_modulate", **arguments, eps=1e-2, subtract_mean=subtract_mean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_is_of_the_rounded_sum(dtype):
    new = Inputs(dtype)
    arguments = norm_arguments(new, 2, 3, 48)
    y, gate = new.normal(2, 3, 48), new.normal(2, 1, 48)
    out, norm = native("residual_gate_norm_modulate", y=y, gate=gate, **arguments)
    assert_same_bits(out, native("residual_gate", x=arguments["x"], y=y, gate=gate))
    assert_same_bits(norm, native("norm_modulate", **(arguments | {"x": out})))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_pass_through_are_copied_bit_for_bit(dtype):
    new = Inputs(dtype)
    x, y = new.normal(3, 4, 24), new.normal(3, 4, 24)
    x[1, 0, :4] = torch.tensor([torch.nan, torch.inf, -0.0, torch.finfo(dtype).smallest_normal / 2])
    y[1] = torch.nan
    kept = torch.tensor([False, True, False], device=DEVICE)
    plain = native("residual_gate", x=x, y=y)
    for pass_through in (kept, kept.repeat_interleave(2)[::2]):
        out = native("residual_gate", x=x, y=y, pass_through=pass_through)
        assert_same_bits(out[1], x[1])
        assert_same_bits(out[::2], plain[::2])


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "split"])
@pytest.mark.parametrize("per_head", [True, False], ids=["per_head", "all_heads"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 3, 8), (1, 5, 5, 6), (2, 2, 11, 64), (1, 2, 2, 300)], ids=str)
def test_qk_norm_rope(shape, dtype, per_head, interleaved):
    for strided in (False, True):
        arguments = rope_arguments(Inputs(dtype, strided=strided), *shape, per_head=per_head)
        options = {"per_head": per_head, "interleaved": interleaved}
        check("qk_norm_rope", **arguments, **options)
        shared = {name: arguments[name][:1, :, :1] for name in ("cos", "sin")}
        check("qk_norm_rope", **(arguments | shared), subtract_mean=True, **options)
        check("qk_norm_rope", **(arguments | {"cos": None, "sin": None}), **options)


@pytest.mark.parametrize("shared", ["cos", "sin"])
def test_cos_and_sin_have_strides_of_their_own(shared):
    """One has a value for all heads; the public op refuses that, the C API does not."""
    arguments = rope_arguments(Inputs(torch.float32), 2, 3, 3, 8)
    arguments[shared] = arguments[shared][:1, :, :1]
    check("qk_norm_rope", **arguments)


@pytest.mark.parametrize("per_head", [True, False], ids=["per_head", "all_heads"])
def test_without_rope_a_head_may_be_odd(per_head):
    for size in (1, 7, 257):
        new = Inputs(torch.float32)
        arguments = rope_arguments(new, 2, 3, 3, size, per_head=per_head) | {"cos": None, "sin": None}
        check("qk_norm_rope", **arguments, per_head=per_head)


GUIDANCE = [
    {"has_uncond": True},
    {"has_uncond": False},
    {"has_uncond": True, "rescale": True},
    {"has_uncond": False, "rescale": True, "over_batch": True},
    {"has_uncond": True, "cfg_star": True},
    {"has_uncond": True, "cfg_star": True, "rescale": True},
    {"has_uncond": True, "cfg_star": True, "rescale": True, "over_batch": True},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skips", [0, 1, 3])
@pytest.mark.parametrize("options", GUIDANCE, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("size", [(1, 2), (7, 5), (33, 97), (64, 128)], ids=str)
def test_combine_guidance(options, skips, dtype, size):
    new = Inputs(dtype)
    arguments = guidance_arguments(new, 2, size, skips, **options)
    for out in DTYPES:
        check("combine_guidance", **arguments, dtype=out)
    for out in DTYPES:
        latents = Inputs(out).normal(2, *size)
        check("combine_guidance", **arguments, latents=latents, dt=torch.tensor([-0.05], device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [0, 1e-5, 1, 10, 1e3, 1e5])
def test_cfg_star_takes_any_uncond(magnitude, dtype):
    """All zero, so small that 1e-8 counts, so large that alpha u is a small difference of large numbers elsewhere."""
    for size in ((7, 5), (33, 97), (40, 250)):
        arguments = far_uncond(Inputs(dtype), magnitude, size)
        for options in ({}, {"rescale": True}, {"rescale": True, "over_batch": True}):
            check("combine_guidance", **arguments, has_uncond=True, cfg_star=True, dtype=torch.float32, **options)


@pytest.mark.parametrize("options", GUIDANCE[2:], ids=lambda options: "-".join(options))
def test_guidance_far_from_zero(options):
    """Sums of squares would cancel here."""
    new = Inputs(torch.float32)
    arguments = guidance_arguments(new, 2, (70, 3989), 1, **options)
    arguments["rows"] += 30
    check("combine_guidance", **arguments)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_conversions_are_exact_and_to_nearest_even(dtype):
    """Without uncond and skips the op only converts: every value of 16 bits, and what lies between two of them."""
    scales = torch.ones(2, device=DEVICE)
    low = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE).view(dtype)[None]
    wide = native("combine_guidance", rows=low, scales=scales, has_uncond=False, dtype=torch.float32)
    torch.testing.assert_close(wide, low.float(), rtol=0, atol=0, equal_nan=True)
    steps = torch.tensor([0, 1, 2**11, 2**12 - 1, 2**12, 2**12 + 1, 2**15 - 1, 2**15, 2**15 + 1], device=DEVICE)
    between = (bits(low.float()).mT + steps.int()).view(torch.float32).view(1, -1)
    narrow = native("combine_guidance", rows=between, scales=scales, has_uncond=False, dtype=dtype)
    expected = between.to(dtype)
    torch.testing.assert_close(narrow, expected, rtol=0, atol=0, equal_nan=True)
    assert_same_bits(narrow[~narrow.isnan()], expected[~expected.isnan()])  # the sign of zero


def test_row_map():
    new = Inputs(torch.float32)
    for row_map in (
        torch.tensor([1, 0, 1, 1, 0], device=DEVICE),
        torch.tensor([1, 9, 0, 9, 1, 9, 1, 9, 0], device=DEVICE)[::2],
    ):
        for tokens in (1, 3):
            x, y = new.normal(5, 3, 40), new.normal(5, 3, 40)
            tables = {name: new.normal(2, tokens, 40) for name in ("scale", "shift")}
            picked = {name: table[row_map] for name, table in tables.items()}
            gate = new.normal(2, tokens, 40)
            for mapped, plain in (
                (native("norm_modulate", x=x, **tables, row_map=row_map), native("norm_modulate", x=x, **picked)),
                (
                    native("residual_gate", x=x, y=y, gate=gate, row_map=row_map),
                    native("residual_gate", x=x, y=y, gate=gate[row_map]),
                ),
                (
                    native("residual_gate_norm_modulate", x=x, y=y, gate=gate, **tables, row_map=row_map),
                    native("residual_gate_norm_modulate", x=x, y=y, gate=gate[row_map], **picked),
                ),
            ):
                assert_same_bits(mapped, plain)
        q, (cos, sin) = new.normal(5, 3, 2, 8), new.normal(2, 2, 3, 1, 4).unbind()
        mapped = native("qk_norm_rope", q=q, k=q, cos=cos, sin=sin, row_map=row_map)
        assert_same_bits(mapped, native("qk_norm_rope", q=q, k=q, cos=cos[row_map], sin=sin[row_map]))


def calls(dtype):
    """One call of each op whose work is worth several threads, as (name, arguments)."""
    new = Inputs(dtype)
    arguments = norm_arguments(new, 3, 37, 1030)
    residual = arguments | {"y": new.normal(3, 37, 1030), "gate": new.normal(3, 1, 1030)}
    yield "norm_modulate", arguments
    yield "residual_gate", {name: residual[name] for name in ("x", "y", "gate")}
    yield "residual_gate_norm_modulate", residual
    yield "qk_norm_rope", rope_arguments(new, 3, 37, 4, 96)
    yield "combine_guidance", guidance_arguments(new, 3, (37, 1031), 2, cfg_star=True, rescale=True)


def shifted(value):
    """The same values one element behind a boundary of 64 bytes."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    memory = value.new_empty(value.numel() + 64)
    start = 1 + -memory.data_ptr() % 64 // memory.element_size()
    return memory[start : start + value.numel()].view(value.shape).copy_(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_alignment(dtype):
    for name, arguments in calls(dtype):
        expected = native(name, **arguments)
        assert_same_bits(native(name, **{key: shifted(value) for key, value in arguments.items()}), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    before = torch.get_num_threads()
    try:
        for name, arguments in calls(dtype):
            torch.set_num_threads(1)
            expected = native(name, **arguments)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                assert_same_bits(native(name, **arguments), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_other_rows(dtype):
    for name, arguments in calls(dtype):
        together = native(name, **arguments)
        for row in range(3):
            if name == "combine_guidance":
                rows = arguments["rows"].unflatten(0, (-1, 3))[:, row].contiguous()
                alone = native(name, **(arguments | {"rows": rows}))
            else:
                alone = native(name, **{key: of_row(value, row) for key, value in arguments.items()})
            expected = (
                tuple(x[row : row + 1] for x in together) if isinstance(together, tuple) else together[row : row + 1]
            )
            assert_same_bits(alone, expected)


def of_row(value, row):
    return value[row : row + 1] if isinstance(value, torch.Tensor) and value.ndim > 2 and value.shape[0] > 1 else value


@pytest.mark.parametrize("name", REFERENCES)
def test_opcheck(name):
    arguments = dict(calls(torch.bfloat16))[name]
    torch.library.opcheck(getattr(torch.ops.stg, f"{name}_native").default, (), arguments)


def test_empty_inputs():
    for shape in ((0, 2, 8), (2, 0, 8), (2, 2, 0)):
        x = torch.ones(shape, device=DEVICE)
        assert native("norm_modulate", x=x).shape == x.shape
        assert native("residual_gate", x=x, y=x).shape == x.shape
        assert native("residual_gate_norm_modulate", x=x, y=x)[1].shape == x.shape
        q = x.unsqueeze(2)
        assert native("qk_norm_rope", q=q, k=q)[1].shape == q.shape
    for shape in ((2, 0, 8), (0, 2, 8)):
        arguments = {
            "rows": torch.ones(shape, device=DEVICE),
            "scales": torch.ones(2, device=DEVICE),
            "has_uncond": True,
        }
        assert native("combine_guidance", **arguments, rescale=True).shape == (shape[0] // 2, *shape[1:])


def test_what_would_read_beyond_a_tensor_is_refused():
    x, q, one = (torch.ones(shape, device=DEVICE) for shape in ((2, 3, 8), (2, 3, 2, 4), (1,)))
    rows, scales = torch.ones(4, 5, device=DEVICE), torch.ones(2, device=DEVICE)
    for match, name, arguments in (
        ("x has dtype Double", "norm_modulate", {"x": x.double()}),
        ("x has shape", "norm_modulate", {"x": x[0]}),
        ("x has stride 2", "norm_modulate", {"x": x[..., ::2]}),
        (r"scale.dtype is float16; it must be float32", "norm_modulate", {"x": x, "scale": x.half()}),
        (r"scale has shape \[2, 2, 8\]", "norm_modulate", {"x": x, "scale": x[:, :2]}),
        (r"weight has shape \[4\]", "norm_modulate", {"x": x, "weight": x[0, 0, :4]}),
        (
            "row_map has dtype Int",
            "norm_modulate",
            {"x": x, "row_map": torch.zeros(2, dtype=torch.int32, device=DEVICE)},
        ),
        (
            "row_map has shape",
            "residual_gate",
            {"x": x, "y": x, "row_map": torch.zeros(3, dtype=torch.int64, device=DEVICE)},
        ),
        ("eps is -1", "norm_modulate", {"x": x, "eps": -1.0}),
        ("y has shape", "residual_gate", {"x": x, "y": x[:1]}),
        ("y.dtype is bfloat16", "residual_gate", {"x": x, "y": x.bfloat16()}),
        ("pass_through has dtype", "residual_gate", {"x": x, "y": x, "pass_through": one.expand(2)}),
        ("between heads", "qk_norm_rope", {"q": q.expand(2, 3, 2, 4)[:, :, :1].expand(2, 3, 2, 4), "k": q}),
        ("cos and sin go together", "qk_norm_rope", {"q": q, "k": q, "cos": q[..., :2].contiguous()}),
        ("cos has shape", "qk_norm_rope", {"q": q, "k": q, "cos": q, "sin": q}),
        (
            "rows has shape",
            "combine_guidance",
            {"rows": rows, "scales": torch.ones(3, device=DEVICE), "has_uncond": True},
        ),
        ("rows has shape", "combine_guidance", {"rows": rows, "scales": one, "has_uncond": True}),
        ("cfg_star", "combine_guidance", {"rows": rows, "scales": scales, "has_uncond": False, "cfg_star": True}),
        ("latents and dt", "combine_guidance", {"rows": rows, "scales": scales, "has_uncond": True, "dt": one}),
        (
            "latents has shape",
            "combine_guidance",
            {"rows": rows, "scales": scales, "has_uncond": True, "latents": rows},
        ),
        (
            "the result has dtype",
            "combine_guidance",
            {"rows": rows, "scales": scales, "has_uncond": True, "dtype": torch.int8},
        ),
    ):
        with pytest.raises(RuntimeError, match=match):
            native(name, **arguments)


def test_the_public_ops_choose_it():
    x = Inputs(torch.bfloat16).normal(2, 3, 40)
    expected = native("norm_modulate", x=x)
    assert_same_bits(stg_kernels.norm_modulate(x, impl="native"), expected)
    if DEVICE == "cpu":
        assert_same_bits(stg_kernels.norm_modulate(x), expected)
