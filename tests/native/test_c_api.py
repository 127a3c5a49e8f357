"""csrc's CPU functions through their C API, in a library without torch or Python; what each of them refuses."""

import ctypes
import re
import shutil
import threading

import pytest
import torch
from native import c_api
from native.c_api import CC, CSRC, CXX, INVALID_ARGUMENT, OK, WARNINGS, Pool, load, params, run
from ops.cases import Inputs, assert_within_budget, widened
from stg_kernels import native_devices
from stg_kernels.combine_guidance.reference import combine_guidance
from stg_kernels.norm_modulate.reference import norm_modulate
from stg_kernels.qk_norm_rope.reference import qk_norm_rope
from stg_kernels.residual_gate.reference import residual_gate, residual_gate_norm_modulate

if CXX is None or CC is None:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

HEADER = CSRC / "include/stg/ops.h"
SOURCES = [CSRC / "check.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
OUTPUTS = ("out", "norm_out", "q_out", "k_out")
INCLUDE = f"-I{CSRC / 'include'}"
BUILD = [CXX, "-std=c++17", "-fopenmp-simd", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", *WARNINGS, INCLUDE]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("stg") / "libstg.so"
    run(*BUILD, "-DSTG_NO_DISPATCH", "-shared", *SOURCES, "-o", path)
    return load(path, "cpu")


def succeed(library, op, struct, pool=None):
    status = getattr(library, f"stg_cpu_{op}")(struct, pool)
    assert status == OK, library.stg_last_error().decode()


def nan_like(*tensors):
    return [torch.full(tensor.shape, torch.nan, dtype=tensor.dtype) for tensor in tensors]


def norm_case(dtype=torch.bfloat16):
    new = Inputs(dtype, strided=True)
    x, scale, shift = new.normal(2, 3, 40), new.normal(2, 1, 40), new.normal(1, 3, 40, dtype=torch.float32)
    tables = {"scale": scale, "shift": shift, "weight": new.normal(40), "bias": new.normal(40)}
    return {"x": x, **tables}, {"rows": 2, "tokens": 3, "channels": 40, "eps": 1e-6}


def case_of(op, dtype=torch.bfloat16):
    """Tensors, sizes and options of a valid call, and the outputs it fills."""
    new = Inputs(dtype, strided=True)
    tensors, sizes = norm_case(dtype)
    y, gate = new.normal(2, 3, 40), new.normal(2, 1, 40)
    if op == "norm_modulate":
        return tensors, sizes, dict(zip(["out"], nan_like(tensors["x"]), strict=True))
    if op == "residual_gate":
        sizes.pop("eps")
        return {"x": tensors["x"], "y": y, "gate": gate}, sizes, dict(zip(["out"], nan_like(y), strict=True))
    if op == "residual_gate_norm_modulate":
        return tensors | {"y": y, "gate": gate}, sizes, dict(zip(["out", "norm_out"], nan_like(y, y), strict=True))
    if op == "qk_norm_rope":
        q, k, cos, sin = (
            new.normal(2, 3, 40),
            new.normal(2, 3, 40),
            *Inputs(torch.float32).normal(2, 2, 3, 5, 4).unbind(),
        )
        tensors = {"q": q, "k": k, "q_weight": new.normal(40), "k_bias": new.normal(40), "cos": cos, "sin": sin}
        sizes = {"rows": 2, "tokens": 3, "heads": 5, "head_size": 8, "eps": 1e-6, "interleaved": True}
        return tensors, sizes, dict(zip(["q_out", "k_out"], nan_like(q, k), strict=True))
    rows, latents = Inputs(dtype).normal(3 * 2, 4097), Inputs(dtype).normal(2, 4097)
    scales = torch.tensor([3.0, 0.7, 1.0])
    sizes = {"videos": 2, "elements": 4097, "skips": 1, "has_uncond": True, "rescale": True, "cfg_star": True}
    sizes |= {"dtype": c_api.DTYPES[dtype], "out_dtype": c_api.DTYPES[dtype]}
    tensors = {"rows": rows, "scales": scales, "latents": latents, "dt": torch.tensor([-0.1])}
    return tensors, sizes, dict(zip(["out"], nan_like(latents), strict=True))


def with_workspace(library, struct):
    size = ctypes.c_size_t()
    assert library.stg_cpu_combine_guidance_workspace(struct, size) == OK
    struct.kept["memory"] = memory = torch.full((size.value + 1,), 255, dtype=torch.uint8)
    struct.workspace, struct.workspace_size = memory.data_ptr() + 1, size.value
    return struct


def valid(library, op, dtype=torch.bfloat16):
    tensors, sizes, outputs = case_of(op, dtype)
    struct = params(op, **tensors, **sizes, **outputs)
    return with_workspace(library, struct) if op == "combine_guidance" else struct


REFERENCES = {
    "norm_modulate": norm_modulate,
    "residual_gate": residual_gate,
    "residual_gate_norm_modulate": residual_gate_norm_modulate,
    "qk_norm_rope": lambda q, k, **rest: tuple(
        x.flatten(2) for x in qk_norm_rope(q.unflatten(-1, (5, 8)), k.unflatten(-1, (5, 8)), **rest)
    ),
    "combine_guidance": lambda **rest: combine_guidance(has_uncond=True, rescale=True, cfg_star=True, **rest),
}


@pytest.mark.parametrize("dtype", c_api.DTYPES, ids=str)
@pytest.mark.parametrize("op", c_api.PARAMS)
def test_results(library, op, dtype):
    tensors, _, _ = case_of(op, dtype)
    struct = valid(library, op, dtype)
    succeed(library, op, struct)
    outputs = tuple(struct.kept[name] for name in OUTPUTS if name in struct.kept)
    low, exact = REFERENCES[op](**tensors), REFERENCES[op](**{name: widened(value) for name, value in tensors.items()})
    assert_within_budget(outputs if isinstance(exact, tuple) else outputs[0], low, exact)


@pytest.mark.parametrize("dtype", c_api.DTYPES, ids=str)
@pytest.mark.parametrize("op", c_api.PARAMS)
def test_bits_do_not_depend_on_vectors(library, op, dtype):
    """This library is not optimized, the compiled module takes the widest vectors that there are."""
    if "cpu" not in native_devices():
        pytest.skip("stg_kernels._C was not built for cpu")
    tensors, sizes, _ = case_of(op, dtype)
    struct = valid(library, op, dtype)
    succeed(library, op, struct)
    options = {name: sizes[name] for name in ("has_uncond", "rescale", "cfg_star") if name in sizes}
    if op == "qk_norm_rope":
        tensors |= {name: tensors[name].unflatten(-1, (5, 8)) for name in "qk"}
    results = getattr(torch.ops.stg, f"{op}_native")(**tensors, **options)
    names = [name for name in OUTPUTS if name in struct.kept]
    for name, result in zip(names, results if isinstance(results, tuple) else (results,), strict=True):
        assert torch.equal(struct.kept[name], result.view(struct.kept[name].shape)), name


@pytest.mark.parametrize("op", c_api.PARAMS)
def test_a_pool_gets_every_index_once_and_changes_no_bit(library, op):
    ranges = []

    @c_api.ParallelFor
    def backwards(context, count, grain, task, argument):
        assert (context, grain > 0) == (7, True)
        cuts = [0, count // 3, count // 2, count]
        for begin, end in zip(cuts[-2::-1], cuts[:0:-1], strict=True):
            ranges.append((begin, end))
            thread = threading.Thread(target=task, args=(argument, begin, end))
            thread.start()
            thread.join()

    alone, shared = valid(library, op), valid(library, op)
    succeed(library, op, alone)
    succeed(library, op, shared, Pool(ctypes.sizeof(Pool), 7, backwards))
    assert ranges
    for name in OUTPUTS:
        if name in alone.kept:
            assert torch.equal(alone.kept[name], shared.kept[name])


def test_row_map_and_pass_through(library):
    x, y, gate = (Inputs(torch.float32).normal(*shape) for shape in ((3, 2, 8), (3, 2, 8), (2, 1, 8)))
    (out,) = nan_like(x)
    row_map, keep = torch.tensor([1, 0, 1]), torch.tensor([False, True, False])
    sizes = {"rows": 3, "tokens": 2, "channels": 8}
    succeed(
        library,
        "residual_gate",
        params("residual_gate", x=x, y=y, gate=gate, row_map=row_map, pass_through=keep, out=out, **sizes),
    )
    assert torch.equal(out[1], x[1])
    torch.testing.assert_close(out, residual_gate(x, y, gate, row_map, keep))


ODD = object()  # the same pointer, one byte further

REFUSED = [
    ("norm_modulate", {"struct_size": 8}, r"params\.struct_size is 8; it must be \d+"),
    ("norm_modulate", {"rows": -1}, "rows is -1; it must be >= 0"),
    ("norm_modulate", {"tokens": -2}, "tokens is -2; it must be >= 0"),
    ("norm_modulate", {"channels": -3}, "channels is -3; it must be >= 0"),
    ("norm_modulate", {"channels": 2**61}, "channels is 2305843009213693952; a tensor must have less than 2"),
    ("norm_modulate", {"x.data": None}, r"x\.data is NULL; it must point"),
    ("norm_modulate", {"x.data": ODD}, r"x\.data is 0x\w+; it must be a multiple of the element's size, 2"),
    ("norm_modulate", {"x.dtype": 3}, r"x\.dtype is 3; it must be 0 \(float32\), 1 \(bfloat16\) or 2 \(float16\)"),
    ("norm_modulate", {"scale.dtype": 2}, r"scale\.dtype is float16; it must be bfloat16, as x's, or float32"),
    ("norm_modulate", {"shift.dtype": -1}, r"shift\.dtype is -1; it must be"),
    ("norm_modulate", {"shift.data": ODD}, r"shift\.data is 0x\w+; it must be a multiple of the element's size, 4"),
    ("norm_modulate", {"weight.dtype": 2}, r"weight\.dtype is float16"),
    ("norm_modulate", {"bias.dtype": 2}, r"bias\.dtype is float16"),
    ("norm_modulate", {"eps": -1.0}, "eps is -1; it must be >= 0"),
    ("norm_modulate", {"eps": float("nan")}, "eps is -?nan; it must be >= 0"),
    ("norm_modulate", {"row_map": 9}, r"row_map is 0x9; it must be a multiple of the element's size, 8"),
    ("norm_modulate", {"out": None}, "out is NULL"),
    ("norm_modulate", {"out": ODD}, "out is 0x"),
    ("residual_gate", {"struct_size": 0}, r"params\.struct_size is 0"),
    ("residual_gate", {"channels": -1}, "channels is -1"),
    ("residual_gate", {"x.data": None}, r"x\.data is NULL"),
    ("residual_gate", {"y.data": None}, r"y\.data is NULL"),
    ("residual_gate", {"y.dtype": 0}, r"y\.dtype is float32; it must be bfloat16, as x's"),
    ("residual_gate", {"gate.dtype": 2}, r"gate\.dtype is float16"),
    ("residual_gate", {"row_map": 1}, "row_map is 0x1"),
    ("residual_gate", {"out": None}, "out is NULL"),
    ("residual_gate_norm_modulate", {"struct_size": 1}, r"params\.struct_size is 1"),
    ("residual_gate_norm_modulate", {"rows": -1}, "rows is -1"),
    ("residual_gate_norm_modulate", {"y.dtype": 2}, r"y\.dtype is float16"),
    ("residual_gate_norm_modulate", {"scale.dtype": 2}, r"scale\.dtype is float16"),
    ("residual_gate_norm_modulate", {"eps": -0.5}, "eps is -0.5"),
    ("residual_gate_norm_modulate", {"out": None}, "out is NULL"),
    ("residual_gate_norm_modulate", {"norm_out": None}, "norm_out is NULL"),
    ("qk_norm_rope", {"struct_size": 7}, r"params\.struct_size is 7"),
    ("qk_norm_rope", {"heads": -1}, "heads is -1"),
    ("qk_norm_rope", {"head_size": -1}, "head_size is -1"),
    ("qk_norm_rope", {"head_size": 7}, "head_size is 7; a rotary embedding needs an even one"),
    ("qk_norm_rope", {"q.data": None}, r"q\.data is NULL"),
    ("qk_norm_rope", {"k.data": None}, r"k\.data is NULL"),
    ("qk_norm_rope", {"k.dtype": 0}, r"k\.dtype is float32; it must be bfloat16, as q's"),
    ("qk_norm_rope", {"q_weight.dtype": 2}, r"q_weight\.dtype is float16; it must be bfloat16, as q's, or float32"),
    ("qk_norm_rope", {"k_bias.dtype": 2}, r"k_bias\.dtype is float16"),
    ("qk_norm_rope", {"cos.data": None}, r"cos\.data is NULL; cos and sin go together"),
    ("qk_norm_rope", {"sin.data": None}, r"sin\.data is NULL; cos and sin go together"),
    ("qk_norm_rope", {"cos.dtype": 1}, r"cos\.dtype is bfloat16; it must be float32"),
    ("qk_norm_rope", {"sin.dtype": 2}, r"sin\.dtype is float16; it must be float32"),
    ("qk_norm_rope", {"eps": -1.0}, "eps is -1"),
    ("qk_norm_rope", {"row_map": 4}, "row_map is 0x4"),
    ("qk_norm_rope", {"q_out": None}, "q_out is NULL"),
    ("qk_norm_rope", {"k_out": None}, "k_out is NULL"),
    ("combine_guidance", {"struct_size": 3}, r"params\.struct_size is 3"),
    ("combine_guidance", {"videos": -1}, "videos is -1"),
    ("combine_guidance", {"elements": -1}, "elements is -1"),
    ("combine_guidance", {"skips": -1}, "skips is -1"),
    ("combine_guidance", {"has_uncond": False}, "cfg_star is true; it must be false where has_uncond is"),
    ("combine_guidance", {"dtype": 5}, "dtype is 5"),
    ("combine_guidance", {"out_dtype": 6}, "out_dtype is 6"),
    ("combine_guidance", {"rows": None}, "rows is NULL"),
    ("combine_guidance", {"scales": None}, "scales is NULL"),
    ("combine_guidance", {"scales": ODD}, "scales is 0x"),
    ("combine_guidance", {"latents": None}, "latents is NULL; latents and dt go together"),
    ("combine_guidance", {"dt": None}, "dt is NULL; latents and dt go together"),
    ("combine_guidance", {"latents": ODD}, "latents is 0x"),
    ("combine_guidance", {"dt": ODD}, "dt is 0x"),
    ("combine_guidance", {"out": None}, "out is NULL"),
    ("combine_guidance", {"workspace_size": 8}, r"workspace_size is 8; it must be at least \d+"),
    ("combine_guidance", {"workspace": None}, "workspace is NULL"),
]


def change(struct, path, value):
    *parents, name = path.split(".")
    for parent in parents:
        struct = getattr(struct, parent)
    setattr(struct, name, getattr(struct, name) + 1 if value is ODD else value)


@pytest.mark.parametrize(
    ("op", "changes", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_refused(library, op, changes, message):
    struct = valid(library, op)
    for path, value in changes.items():
        change(struct, path, value)
    assert getattr(library, f"stg_cpu_{op}")(struct, None) == INVALID_ARGUMENT
    assert re.match(message, library.stg_last_error().decode()), library.stg_last_error()
    for name in OUTPUTS:
        assert name not in struct.kept or struct.kept[name].isnan().all(), "something was run"


@pytest.mark.parametrize("op", c_api.PARAMS)
def test_refused_structs_and_pools(library, op):
    function = getattr(library, f"stg_cpu_{op}")
    for struct, pool, message in (
        (None, None, b"params is NULL"),
        (valid(library, op), Pool(4), rb"pool\.struct_size is 4"),
        (valid(library, op), Pool(ctypes.sizeof(Pool)), rb"pool\.parallel_for is NULL"),
    ):
        assert function(struct, pool) == INVALID_ARGUMENT
        assert re.match(message, library.stg_last_error())


def test_workspace_query(library):
    query, size = library.stg_cpu_combine_guidance_workspace, ctypes.c_size_t(1)
    assert query(None, size) == INVALID_ARGUMENT
    assert query(params("combine_guidance"), None) == INVALID_ARGUMENT
    assert library.stg_last_error() == b"size is NULL; it must point to a size_t"
    assert query(params("combine_guidance", videos=-1), size) == INVALID_ARGUMENT
    assert query(params("combine_guidance", videos=2, elements=10**6, has_uncond=True), size) == OK
    assert size.value == 0
    assert query(params("combine_guidance", videos=2, elements=10**6, rescale=True), size) == OK
    assert 0 < size.value < 10**6 / 8


@pytest.mark.parametrize("op", c_api.PARAMS)
def test_nothing_to_do_needs_no_pointers(library, op):
    succeed(library, op, params(op))


def test_errors_belong_to_their_thread(library):
    def fail(message):
        assert library.stg_cpu_norm_modulate(None, None) == INVALID_ARGUMENT
        message.append(library.stg_last_error())

    assert library.stg_cpu_norm_modulate(params("norm_modulate", rows=-5), None) == INVALID_ARGUMENT
    there = []
    thread = threading.Thread(target=fail, args=(there,))
    thread.start()
    thread.join()
    assert there == [b"params is NULL"]
    assert library.stg_last_error().startswith(b"rows is -5")


@pytest.mark.parametrize(("compiler", "language", "standard"), [(CC, "c", "c99"), (CXX, "c++", "c++17")])
def test_header_stands_alone(compiler, language, standard, tmp_path):
    source = tmp_path / "header.txt"
    source.write_text('#include "stg/ops.h"\nint stg_header_alone;\n')
    run(compiler, "-x", language, f"-std={standard}", *WARNINGS, INCLUDE, "-fsyntax-only", source)


def test_example_in_the_header_compiles(tmp_path):
    example = re.search(r'(?ms)^ \*     #include "stg/ops.h".*?^ \*/', HEADER.read_text()).group().removesuffix(" */")
    source = tmp_path / "example.c"
    source.write_text("#include <stdio.h>\n" + re.sub(r"(?m)^ \* ?", "", example))
    run(CC, "-std=c99", *WARNINGS, "-Wno-error=missing-prototypes", INCLUDE, "-c", source, "-o", tmp_path / "example.o")


def test_c_program_links_the_static_library(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("there is no cmake")
    folder = tmp_path / "build"
    run(cmake, "-S", CSRC, "-B", folder, f"-DCMAKE_CXX_COMPILER={CXX}")
    run(cmake, "--build", folder)
    smoke, program = CSRC.parent / "tests/native/ops_smoke.c", tmp_path / "ops_smoke"
    run(CC, "-std=c99", *WARNINGS, INCLUDE, smoke, folder / "libstg.a", "-lstdc++", "-lm", "-o", program)
    assert run(program).strip() == "ok"


def test_smoke_program_is_clean_under_sanitizers(tmp_path):
    program = tmp_path / "ops_smoke"
    sanitize = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    smoke = tmp_path / "ops_smoke.o"
    run(CC, "-std=c99", *WARNINGS, INCLUDE, *sanitize, "-c", CSRC.parent / "tests/native/ops_smoke.c", "-o", smoke)
    run(*BUILD, *sanitize, "-DSTG_NO_DISPATCH", *SOURCES, smoke, "-o", program, "-lm")
    assert run(program).strip() == "ok"
