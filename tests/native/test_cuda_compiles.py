"""csrc's CUDA functions compile without spills; what they say where there is no device to launch on."""

import ctypes
import re
import shutil

import pytest
import torch
from native.c_api import CSRC, CUDA_ERROR, INVALID_ARGUMENT, OK, PARAMS, load, params, run

NVCC = shutil.which("nvcc")
if NVCC is None:
    pytest.skip("there is no nvcc", allow_module_level=True)

ARCHITECTURES = ("80", "90", "100")
KERNELS = {
    "combine_guidance": {"moments_kernel", "write_kernel"},
    "norm_modulate": {"norm_modulate_kernel"},
    "qk_norm_rope": {"qk_norm_rope_kernel"},
    "residual_gate": {"residual_gate_kernel", "residual_gate_norm_modulate_kernel"},
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


def nvcc(*arguments):
    codes = ",".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-I{CSRC / 'include'}"]
    flags.append("-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
    return run(NVCC, *flags, f"-gencode=arch=compute_80,code=[{codes}]", *arguments)


@pytest.mark.parametrize("op", KERNELS)
def test_no_spills(op, objects):
    text = nvcc("-Xptxas=-v", "-c", CSRC / f"cuda/{op}.cu", "-o", objects / f"{op}.o")
    assert "warning" not in text, text
    usage = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n.*\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        text,
    )
    assert {architecture for _, architecture, *_ in usage} == set(ARCHITECTURES)
    assert {kernel for kernel in KERNELS[op] if any(kernel in name for name, *_ in usage)} == KERNELS[op]
    assert [line for line in usage if line[2:] != ("0", "0", "0")] == []


def test_functions_without_a_device(objects):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: a launch on the host pointers below would break its context")
    missing = [op for op in KERNELS if not (objects / f"{op}.o").exists()]
    if missing:
        pytest.skip(f"{', '.join(missing)} did not compile")
    nvcc("-shared", CSRC / "check.cpp", *sorted(objects.glob("*.o")), "-o", objects / "libstg.so")
    library = load(objects / "libstg.so", "cuda")

    x = torch.ones(2, 3, 8)
    sizes = {"rows": 2, "tokens": 3, "channels": 8}
    rope = {"rows": 2, "tokens": 3, "heads": 2, "head_size": 4}
    rows, size = torch.ones(2, 24), ctypes.c_size_t()
    calls = {
        "norm_modulate": params("norm_modulate", x=x, out=x, **sizes),
        "residual_gate": params("residual_gate", x=x, y=x, out=x, **sizes),
        "residual_gate_norm_modulate": params("residual_gate_norm_modulate", x=x, y=x, out=x, norm_out=x, **sizes),
        "qk_norm_rope": params("qk_norm_rope", q=x, k=x, q_out=x, k_out=x, **rope),
        "combine_guidance": params(
            "combine_guidance", videos=1, elements=24, has_uncond=True, rows=rows, scales=x, out=x, rescale=True
        ),
    }
    guidance = calls["combine_guidance"]
    assert library.stg_cuda_combine_guidance(guidance, None) == INVALID_ARGUMENT
    assert re.match(rb"workspace_size is 0; it must be at least \d+", library.stg_last_error())
    assert library.stg_cuda_combine_guidance_workspace(guidance, size) == OK
    memory = torch.empty(size.value, dtype=torch.uint8)
    guidance.workspace, guidance.workspace_size = memory.data_ptr(), size.value

    for op, struct in calls.items():
        function = getattr(library, f"stg_cuda_{op}")
        assert function(params(op), None) == OK, "nothing to do"
        assert function(PARAMS[op](), None) == INVALID_ARGUMENT
        assert library.stg_last_error().startswith(b"params.struct_size is 0")
        assert function(struct, None) == CUDA_ERROR
        assert library.stg_last_error().startswith(b"cudaError")
