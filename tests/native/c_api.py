"""csrc/include/stg/ops.h for ctypes, with torch tensors as memory. A struct that differs has another size: refused."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

CSRC = Path(__file__).parents[2] / "csrc"
OK, INVALID_ARGUMENT, CUDA_ERROR = range(3)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
CXX, CC = (next(filter(None, map(shutil.which, names)), None) for names in (("g++", "clang++"), ("gcc", "clang")))


class Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int), ("strides", c_int64 * 3)]


def _struct(name, *fields):
    def members(text, kind):
        return [(field, kind) for field in text.split()]

    flat = [("struct_size", c_size_t)]
    for text, kind in fields:
        flat += members(text, kind)
    return type(name, (ctypes.Structure,), {"_fields_": flat})


PARAMS = {
    "norm_modulate": _struct(
        "NormModulateParams",
        ("rows tokens channels", c_int64),
        ("x scale shift weight bias", Tensor),
        ("row_map", c_void_p),
        ("eps", c_float),
        ("subtract_mean", c_bool),
        ("out", c_void_p),
    ),
    "residual_gate": _struct(
        "ResidualGateParams",
        ("rows tokens channels", c_int64),
        ("x y gate", Tensor),
        ("row_map pass_through out", c_void_p),
    ),
    "residual_gate_norm_modulate": _struct(
        "ResidualGateNormModulateParams",
        ("rows tokens channels", c_int64),
        ("x y gate scale shift weight bias", Tensor),
        ("row_map pass_through", c_void_p),
        ("eps", c_float),
        ("subtract_mean", c_bool),
        ("out norm_out", c_void_p),
    ),
    "qk_norm_rope": _struct(
        "QkNormRopeParams",
        ("rows tokens heads head_size", c_int64),
        ("q k q_weight k_weight q_bias k_bias cos sin", Tensor),
        ("row_map", c_void_p),
        ("eps", c_float),
        ("per_head subtract_mean interleaved", c_bool),
        ("q_out k_out", c_void_p),
    ),
    "combine_guidance": _struct(
        "CombineGuidanceParams",
        ("videos elements skips", c_int64),
        ("has_uncond rescale over_batch cfg_star", c_bool),
        ("dtype", c_int),
        ("rows scales latents dt", c_void_p),
        ("out_dtype", c_int),
        ("out workspace", c_void_p),
        ("workspace_size", c_size_t),
    ),
}

Task = ctypes.CFUNCTYPE(None, c_void_p, c_int64, c_int64)
ParallelFor = ctypes.CFUNCTYPE(None, c_void_p, c_int64, c_int64, Task, c_void_p)


class Pool(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("context", c_void_p), ("parallel_for", ParallelFor)]


def view(tensor):
    """A [R, S, C] tensor or a vector; dimensions of size 1 repeat."""
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]
    return Tensor(tensor.data_ptr(), DTYPES[tensor.dtype], (c_int64 * 3)(*strides, *[0] * (3 - len(strides))))


def params(op, **fields):
    """The struct of an op; tensors become views or pointers, and live as long as it."""
    struct = PARAMS[op]()
    struct.struct_size = ctypes.sizeof(struct)
    kinds = dict(struct._fields_)
    struct.kept = fields
    for name, value in fields.items():
        if isinstance(value, torch.Tensor):
            value = view(value) if kinds[name] is Tensor else value.data_ptr()
        setattr(struct, name, value)
    return struct


def load(path, flavour):
    """The library at `path` with the functions of "cpu" or "cuda" declared."""
    library = ctypes.CDLL(str(path))
    library.stg_last_error.restype = c_char_p
    last = POINTER(Pool) if flavour == "cpu" else c_void_p
    for op, struct in PARAMS.items():
        getattr(library, f"stg_{flavour}_{op}").argtypes = [POINTER(struct), last]
    query = getattr(library, f"stg_{flavour}_combine_guidance_workspace")
    query.argtypes = [POINTER(PARAMS["combine_guidance"]), POINTER(c_size_t)]
    return library


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr
