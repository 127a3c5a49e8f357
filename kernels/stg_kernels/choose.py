"""Which implementation of an op runs. Used by the ops' `api.py` alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stg_kernels import ops

IMPLS = ("reference", "fused", "native")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load_native() -> frozenset[str]:
    if importlib.util.find_spec("stg_kernels._C") is None:
        return frozenset()
    _C = importlib.import_module("stg_kernels._C")  # importing registers the ops
    return frozenset(_C.DEVICES)


_NATIVE = _load_native()


def native_devices() -> frozenset[str]:
    """Device types that the compiled library serves; empty if it was not built. A broken library raises on import."""
    return _NATIVE


def accelerates(device: torch.device) -> bool:
    """True if ops run compiled code on this device: Triton on CUDA, the compiled library elsewhere."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type in native_devices()


def run(name: str, impl: str | None, device: torch.device, *arguments: Any) -> Any:
    """Call op `name`. `impl=None`: Triton on CUDA; on CPU the compiled library, the reference where there is none.

    float64, which only the reference has, goes there.
    """
    if impl not in (None, *IMPLS):
        raise ValueError(f"impl={impl!r} is not allowed; choose one of None, {', '.join(map(repr, IMPLS))}")
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        raise RuntimeError(f"{name} has no gradients; call it under torch.no_grad()")
    if arguments[0].dtype not in DTYPES:
        if arguments[0].dtype != torch.float64 or impl not in (None, "reference"):
            raise ValueError(f"{arguments[0].dtype} has no impl={impl!r}; use float32, bfloat16 or float16")
        impl = "reference"
    if impl == "native" and device.type not in native_devices():
        built = ", ".join(sorted(native_devices())) or "no device"
        raise RuntimeError(
            f"impl='native' is not there for {device.type}: stg_kernels._C was built for {built}; "
            "pip install --no-build-isolation builds it where there are a compiler and torch"
        )
    if impl == "native" or (impl is None and device.type == "cpu" and "cpu" in native_devices()):
        return getattr(torch.ops.stg, f"{name}_native")(*arguments)
    if impl is None:
        return getattr(torch.ops.stg, name)(*arguments)
    module = importlib.import_module(f"stg_kernels.{ops.FOLDERS[name]}.{impl}")
    return getattr(module, name)(*arguments)


def check_floating(**tensors: Tensor | None) -> None:
    """`ValueError` for a tensor that is not floating point; `TypeError` for what is no tensor."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}={tensor!r} is not allowed; it must be a tensor")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating point tensor")


def check_beside(x: Tensor, /, **tensors: Tensor | None) -> None:
    """`ValueError` unless every tensor is on x's device with x's dtype or float32, its last dimension contiguous."""
    check_floating(**tensors)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {x.device}, as x is")
        if tensor.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must have {x.dtype}, as x, or float32")
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be 1")


def check_eps(eps: float) -> None:
    """`ValueError` unless eps is a finite number of at least 0; `TypeError` for what is no number."""
    if not isinstance(eps, int | float):
        raise TypeError(f"eps={eps!r} is not allowed; it must be a number")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps} is not allowed; it must be a finite number of at least 0")


def check_required(**tensors: Tensor | None) -> None:
    """`TypeError` for an absent tensor."""
    for name, tensor in tensors.items():
        if tensor is None:
            raise TypeError(f"{name}=None is not allowed; it must be a tensor")


def check_dimensions(name: str, tensor: Tensor, letters: str) -> None:
    """`ValueError` unless the tensor has one dimension per letter."""
    if tensor.ndim != len(letters.split()):
        shape = ", ".join(letters.split())
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [{shape}]")


def check_shape(name: str, tensor: Tensor | None, *allowed: Iterable[int]) -> None:
    """`ValueError` unless each dimension of the tensor has one of the allowed sizes."""
    if tensor is None:
        return
    sizes = tuple(tuple(sizes) for sizes in allowed)
    if tensor.ndim != len(sizes) or any(size not in ok for size, ok in zip(tensor.shape, sizes, strict=False)):
        words = ", ".join(" or ".join(map(str, dict.fromkeys(ok))) or "any" for ok in sizes)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [{words}]")


def check_row_map(row_map: Tensor | None, x: Tensor, **tables: Tensor | None) -> tuple[int, ...]:
    """Sizes allowed for dim 0 of the tables: R or 1, or the one size that all tables have if a row map is given."""
    if row_map is None:
        return (x.shape[0], 1)
    if not isinstance(row_map, Tensor):
        raise TypeError(f"row_map={row_map!r} is not allowed; it must be a tensor")
    if row_map.dtype != torch.int64 or row_map.shape != x.shape[:1] or row_map.device != x.device:
        raise ValueError(
            f"row_map is {row_map.dtype} {tuple(row_map.shape)} on {row_map.device}; "
            f"it must be int64 [{x.shape[0]}] on {x.device}"
        )
    sizes = {tensor.shape[0] for tensor in tables.values() if tensor is not None and tensor.ndim > 0}
    if len(sizes) > 1:
        raise ValueError(f"{', '.join(tables)} have {sorted(sizes)} rows; with a row_map they must have equally many")
    # On another device it would wait for it, and a graph would break.
    if row_map.device.type == "cpu" and row_map.numel() and sizes and not torch.compiler.is_compiling():
        low, high = row_map.min().item(), row_map.max().item()
        if low < 0 or high >= min(sizes):
            raise ValueError(f"row_map holds {low} to {high}; its values must be 0 to {min(sizes) - 1}")
    return tuple(sizes)
