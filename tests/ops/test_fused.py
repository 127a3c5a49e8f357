"""Triton kernels against the references in float64, on a CUDA device or under Triton's interpreter."""

import pytest
import stg_kernels
import torch
from ops.cases import DEVICE, DTYPES, Inputs, all_residual_arguments, assert_within_budget, far_uncond, widened
from stg_kernels.combine_guidance.reference import combine_guidance
from stg_kernels.norm_modulate.reference import norm_modulate
from stg_kernels.qk_norm_rope.reference import qk_norm_rope
from stg_kernels.residual_gate.reference import residual_gate, residual_gate_norm_modulate

pytest.importorskip("triton", reason="Triton is not installed")
from stg_kernels._triton import outer_strides, vector_length

SHAPES = [(1, 1, 8), (2, 3, 40), (3, 5, 64), (1, 7, 2), (2, 1, 129)]


pytestmark = pytest.mark.usefixtures("poisoned")


def check(reference, public, arguments, **options):
    """Public op with impl="fused" against the reference in float64, in the inputs' dtype as budget."""
    wide = {name: widened(value) for name, value in arguments.items()}
    exact = reference(**wide, **options)
    low = reference(**arguments, **options)
    assert_within_budget(public(**arguments, **options, impl="fused"), low, exact)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("subtract_mean", [False, True], ids=["rms", "layer"])
def test_norm_modulate(shape, dtype, strided, subtract_mean):
    new = Inputs(dtype, strided=strided)
    rows, tokens, channels = shape
    arguments = {
        "x": new.normal(*shape),
        "scale": new.normal(rows, 1, channels),
        "shift": new.normal(1, tokens, channels, dtype=torch.float32),
        "weight": new.normal(channels),
    }
    check(norm_modulate, stg_kernels.norm_modulate, arguments, subtract_mean=subtract_mean)
    check(norm_modulate, stg_kernels.norm_modulate, {"x": arguments["x"], "bias": new.normal(channels)}, eps=1e-2)


def test_vectors_with_strides():
    new = Inputs(torch.float32)
    x, y, tables = new.normal(4, 3, 16), new.normal(4, 3, 16), new.normal(2, 1, 16)
    row_map = torch.tensor([0, 0, 1, 0, 1, 1, 0, 0], device=DEVICE)[::2]
    keep = torch.tensor([True, False, False, False, True, False, False, True], device=DEVICE)[::2]
    check(residual_gate, stg_kernels.residual_gate, {"x": x, "y": y, "gate": tables, "row_map": row_map})
    check(residual_gate, stg_kernels.residual_gate, {"x": x, "y": y, "pass_through": keep})
    scales = torch.tensor([4.0, 99.0, 0.7, 99.0, 1.5, 99.0], device=DEVICE)[::2]
    arguments = {"rows": new.normal(3, 5, 7), "scales": scales}
    check(combine_guidance, stg_kernels.combine_guidance, arguments, has_uncond=True, rescale=True)


def test_row_map():
    new = Inputs(torch.float32)
    x, row_map = new.normal(5, 3, 16), torch.tensor([1, 0, 1, 1, 0], device=DEVICE)
    tables = {name: new.normal(2, 1, 16) for name in ("scale", "shift")}
    mapped = stg_kernels.norm_modulate(x, **tables, row_map=row_map, impl="fused")
    plain = stg_kernels.norm_modulate(x, **{k: v[row_map] for k, v in tables.items()}, impl="fused")
    assert torch.equal(mapped, plain)
    gate, y = new.normal(2, 3, 16), new.normal(5, 3, 16)
    mapped = stg_kernels.residual_gate(x, y, gate, row_map=row_map, impl="fused")
    assert torch.equal(mapped, stg_kernels.residual_gate(x, y, gate[row_map], impl="fused"))
    q, (cos, sin) = new.normal(5, 3, 2, 8), new.normal(2, 2, 3, 1, 4).unbind()
    mapped = stg_kernels.qk_norm_rope(q, q, cos=cos, sin=sin, row_map=row_map, impl="fused")
    plain = stg_kernels.qk_norm_rope(q, q, cos=cos[row_map], sin=sin[row_map], impl="fused")
    assert all(map(torch.equal, mapped, plain))


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_gate(shape, dtype, strided):
    new = Inputs(dtype, strided=strided)
    rows, tokens, channels = shape
    arguments = {"x": new.normal(*shape), "y": new.normal(*shape)}
    check(residual_gate, stg_kernels.residual_gate, arguments)
    arguments["gate"] = new.normal(1, tokens, channels)
    check(residual_gate, stg_kernels.residual_gate, arguments)
    arguments |= {"scale": new.normal(rows, 1, channels), "shift": new.normal(rows, 1, channels)}
    check(residual_gate_norm_modulate, stg_kernels.residual_gate_norm_modulate, arguments)


@pytest.mark.parametrize("subtract_mean", [False, True], ids=["rms", "layer"])
def test_residual_gate_with_all_arguments(subtract_mean):
    arguments = all_residual_arguments(Inputs(torch.float32))
    public = stg_kernels.residual_gate_norm_modulate
    check(residual_gate_norm_modulate, public, arguments, eps=1e-2, subtract_mean=subtract_mean)


def test_promises_to_the_compiler():
    """Vectors of 8 elements only where every line begins on one; a shared table is not walked over."""
    aligned, odd = torch.empty(2, 3, 16), torch.empty(2, 3, 12)
    assert vector_length(aligned, None, aligned[:1]) == 8
    assert vector_length(aligned[..., :12]) == 8
    assert vector_length(aligned, odd) == 1
    assert vector_length(torch.empty(16), aligned) == 8
    assert outer_strides(aligned, 2) == (48, 16)
    assert outer_strides(aligned[:1], 2) == (0, 16)
    assert outer_strides(aligned[:, :1], 2) == (48, 0)
    assert outer_strides(None, 2) == (0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_norm_is_the_norm_of_the_rounded_sum(dtype):
    new = Inputs(dtype)
    x, y, gate, scale, shift = (new.normal(2, 3, 48) for _ in range(5))
    h, norm = stg_kernels.residual_gate_norm_modulate(x, y, gate, scale, shift, impl="fused")
    assert torch.equal(h, stg_kernels.residual_gate(x, y, gate, impl="fused"))
    assert torch.equal(norm, stg_kernels.norm_modulate(h, scale, shift, impl="fused"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_pass_through_are_copied_bit_for_bit(dtype):
    new = Inputs(dtype)
    x, y = new.normal(3, 4, 24), new.normal(3, 4, 24)
    x[1, 0, :4] = torch.tensor([torch.nan, torch.inf, -0.0, torch.finfo(dtype).smallest_normal / 2])
    y[1] = torch.nan
    keep = torch.tensor([False, True, False], device=DEVICE)
    out = stg_kernels.residual_gate(x, y, pass_through=keep, impl="fused")
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out[1].view(bits), x[1].view(bits))
    assert torch.equal(out[::2], stg_kernels.residual_gate(x, y, impl="fused")[::2])


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "split"])
@pytest.mark.parametrize("per_head", [True, False], ids=["per_head", "all_heads"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 3, 8), (1, 5, 5, 6), (2, 2, 2, 16)], ids=str)
def test_qk_norm_rope(shape, dtype, per_head, interleaved):
    rows, tokens, heads, size = shape
    normed = size if per_head else heads * size
    for strided in (False, True):
        new = Inputs(dtype, strided=strided)
        q, k = (new.normal(rows, tokens, heads * size).unflatten(-1, (heads, size)) for _ in range(2))
        flat = Inputs(dtype)
        angles = flat.normal(rows, tokens, heads, size // 2, dtype=torch.float32)
        arguments = {"q": q, "k": k, "q_weight": flat.normal(normed), "k_weight": flat.normal(normed)}
        options = {"per_head": per_head, "interleaved": interleaved}
        check(qk_norm_rope, stg_kernels.qk_norm_rope, arguments, **options)
        arguments |= {"cos": angles.cos(), "sin": angles.sin()}
        arguments |= {"q_bias": flat.normal(normed), "k_bias": flat.normal(normed)}
        check(qk_norm_rope, stg_kernels.qk_norm_rope, arguments, subtract_mean=True, **options)
        shared = {"cos": arguments["cos"][:1, :, :1], "sin": arguments["sin"][:1, :, :1]}
        check(qk_norm_rope, stg_kernels.qk_norm_rope, arguments | shared, **options)


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
@pytest.mark.parametrize("size", [(1, 2), (7, 5), (33, 97)], ids=str)
def test_combine_guidance(options, skips, dtype, size):
    new, videos = Inputs(dtype), 2
    base = new.normal(videos, *size) + 0.5
    rows = torch.cat([base + 0.1 * new.normal(videos, *size) for _ in range(1 + skips + options["has_uncond"])])
    scales = torch.tensor([8.0, 0.7, *[1.5, 0.5, 4.0][:skips]], device=DEVICE)
    arguments = {"rows": rows, "scales": scales}
    options = {"dtype": torch.float32, **options}
    check(combine_guidance, stg_kernels.combine_guidance, arguments, **options)
    latents = {"latents": new.normal(videos, *size), "dt": torch.tensor([-0.05], device=DEVICE)}
    check(combine_guidance, stg_kernels.combine_guidance, arguments | latents, **{**options, "dtype": None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [0, 1e-5, 1, 10, 1e3, 1e5])
def test_cfg_star_takes_any_uncond(magnitude, dtype):
    """All zero, so small that 1e-8 counts, so large that alpha u is a small difference of large numbers elsewhere."""
    for size in ((7, 5), (33, 97), (40, 250)):
        arguments = far_uncond(Inputs(dtype), magnitude, size)
        for options in ({}, {"rescale": True}, {"rescale": True, "over_batch": True}):
            check(
                combine_guidance,
                stg_kernels.combine_guidance,
                arguments,
                has_uncond=True,
                cfg_star=True,
                dtype=torch.float32,
                **options,
            )


@pytest.mark.parametrize("options", GUIDANCE[2:], ids=lambda options: "-".join(options))
def test_guidance_over_many_chunks(options):
    """More blocks than a video has chunks, and a last chunk that is not full."""
    new = Inputs(torch.float32)
    rows = torch.cat([new.normal(1, 70, 3989).repeat(2, 1, 1) + 0.1 * new.normal(2, 70, 3989) + 3 for _ in range(3)])
    if not options["has_uncond"]:
        rows = rows[:4]
    scales = torch.tensor([8.0, 0.7, 1.5], device=DEVICE)
    check(combine_guidance, stg_kernels.combine_guidance, {"rows": rows, "scales": scales}, **options)


def test_a_video_does_not_depend_on_the_batch():
    new = Inputs(torch.float32)
    rows = new.normal(3, 3, 50, 41)
    scales = torch.tensor([6.0, 0.7, 1.5], device=DEVICE)
    options = {"has_uncond": True, "rescale": True, "cfg_star": True, "impl": "fused"}
    together = stg_kernels.combine_guidance(rows.flatten(0, 1), scales, **options)
    for video in range(3):
        alone = stg_kernels.combine_guidance(rows[:, video].contiguous(), scales, **options)
        assert torch.equal(together[video], alone[0])
    x, scale = new.normal(3, 5, 40), new.normal(3, 1, 40)
    together = stg_kernels.norm_modulate(x, scale, impl="fused")
    assert torch.equal(together[1:2], stg_kernels.norm_modulate(x[1:2], scale[1:2], impl="fused"))


def test_empty_inputs():
    x = torch.ones(2, 0, 8, device=DEVICE)
    assert stg_kernels.norm_modulate(x, impl="fused").shape == x.shape
    assert stg_kernels.residual_gate(x, x, impl="fused").shape == x.shape
    q = x.unflatten(-1, (2, 4))
    assert stg_kernels.qk_norm_rope(q, q, impl="fused")[1].shape == q.shape
    rows = torch.ones(2, 0, 8, device=DEVICE)
    assert stg_kernels.combine_guidance(rows, torch.ones(2, device=DEVICE), has_uncond=True, impl="fused").shape[1] == 0
