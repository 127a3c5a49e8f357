"""Attention kernels by name, "family/variant": what each can run, and the call. Libraries load when they are asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stg_kernels.attention import reference
from stg_kernels.attention.parts import Part, of_rows


@dataclass(frozen=True)
class Backend:
    """why_not: the reason that a part cannot run, or ""; run: [G, S, N, D]."""

    name: str
    why_not: Callable[[Part], str]
    run: Callable[[Part], Tensor]
    is_exact: bool = True


def spread(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with as many rows each: queries that read one row of keys become one row, other keys are copied."""
    q, k, v = part.q, part.k, part.v
    if part.shared_row:
        return q.reshape(1, -1, *q.shape[2:]), k, v
    if part.kv_rows is not None:
        return q, of_rows(k, part.kv_rows), of_rows(v, part.kv_rows)
    return q, k, v


_sdpa_flags = threading.Lock()
"""`sdpa_kernel` switches flags of the process: two threads would leave them changed."""


def _sdpa(part: Part, kernel: SDPBackend | None = None) -> Tensor:
    if part.key_lengths is not None and part.q.device.type == "cpu":
        return _rows_apart(part, part.key_lengths)
    q, k, v = (x.transpose(1, 2) for x in spread(part))
    mask = None
    if part.key_lengths is not None:
        is_there = _is_there(part, part.key_lengths)
        mask = is_there[:, None, None]
        k, v = (x.masked_fill(~is_there[:, None, :, None], 0.0) for x in (k, v))  # NaN would outlive the mask
    if kernel is None:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=part.scale)
    else:
        with _sdpa_flags, sdpa_kernel(kernel):
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=part.scale)
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2).reshape(part.q.shape)


def _is_there(part: Part, key_lengths: Tensor) -> Tensor:
    """[rows of `spread`, K]"""
    position = torch.arange(part.k.shape[1], device=part.k.device) + part.key_start
    is_there = position < key_lengths[:, None]
    return is_there if part.kv_rows is None or part.shared_row else of_rows(is_there, part.kv_rows)


def _rows_apart(part: Part, key_lengths: Tensor) -> Tensor:
    """Where a length is at hand without waiting, a row needs no mask."""
    out = part.q.new_zeros(part.q.shape)
    for row, source in enumerate(part.kv_rows or range(part.q.shape[0])):
        keys = slice(0, max(0, min(part.k.shape[1], int(key_lengths[source]) - part.key_start)))
        if keys.stop > 0:
            q, k, v = (x.transpose(0, 1)[None] for x in (part.q[row], part.k[source, keys], part.v[source, keys]))
            out[row] = scaled_dot_product_attention(q, k, v, scale=part.scale)[0].transpose(0, 1)
    return out


def _sdpa_why_not(part: Part, kernel: SDPBackend | None = None) -> str:
    if part.own_k is not None:
        return OWN_KEYS
    if kernel is None:
        return ""
    if part.q.device.type != "cuda":
        return f"{kernel.name} is for CUDA tensors, these are on {part.q.device}"
    if kernel == SDPBackend.FLASH_ATTENTION and part.key_lengths is not None:
        return "flash attention takes no mask, which SDPA needs for key lengths"
    if kernel != SDPBackend.EFFICIENT_ATTENTION and part.q.dtype not in (torch.bfloat16, torch.float16):
        return f"{kernel.name} takes bfloat16 and float16, not {part.q.dtype}"
    return ""


OWN_KEYS = "no library has rows with keys of their own"


def _dense_why_not(module: str, function: str, part: Part, largest: int = 256) -> str:
    """For a library that takes q, k, v of dense rows in bfloat16 and float16."""
    if part.own_k is not None:
        return OWN_KEYS
    if part.key_lengths is not None:
        return "its call has no key lengths"
    if not part.q.is_cuda or part.q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16 on CUDA, not {part.q.dtype} on {part.q.device}"
    if part.q.shape[-1] > largest or part.q.shape[-1] % 8:
        return f"it takes head sizes up to {largest} that 8 divides, not {part.q.shape[-1]}"
    try:
        _function(module, function)
    except (ImportError, AttributeError, OSError) as error:
        return f"{module}.{function} cannot be imported: {error}"
    return ""


@cache
def _function(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def _dense(module: str, function: str, part: Part) -> Tensor:
    out = _function(module, function)(*spread(part), softmax_scale=part.scale)
    return (out[0] if isinstance(out, tuple) else out).reshape(part.q.shape)


def _xformers(part: Part, operator: str) -> Tensor:
    q, k, v = spread(part)
    kernel = _function(f"xformers.ops.fmha.{operator}", "FwOp")
    attention = _function("xformers.ops", "memory_efficient_attention_forward")
    return attention(q, k, v, scale=part.scale, op=kernel).reshape(part.q.shape)


def _sage(part: Part) -> Tensor:
    q, k, v = spread(part)
    out = _function("sageattention", "sageattn")(q, k, v, tensor_layout="NHD", sm_scale=part.scale)
    return out.reshape(part.q.shape)


def _triton_why_not(part: Part, config: str) -> str:
    return _fused().why_not(part, config)


def _triton(part: Part, config: str) -> Tensor:
    return _fused().attention(part, config)


def _fused() -> Any:
    return import_module("stg_kernels.attention.fused")


def _library(name: str, module: str, function: str) -> Backend:
    return Backend(name, partial(_dense_why_not, module, function), partial(_dense, module, function))


LIBRARIES = (
    Backend("sdpa", _sdpa_why_not, _sdpa),
    *(
        Backend(f"sdpa/{name}", partial(_sdpa_why_not, kernel=kernel), partial(_sdpa, kernel=kernel))
        for name, kernel in (
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        )
    ),
    _library("flash-attn-4", "flash_attn.cute", "flash_attn_func"),
    _library("flash-attn-3", "flash_attn_interface", "flash_attn_func"),
    _library("flash-attn-2", "flash_attn", "flash_attn_func"),
    *(
        Backend(
            f"xformers/{operator}",
            partial(_dense_why_not, f"xformers.ops.fmha.{operator}", "FwOp"),
            partial(_xformers, operator=operator),
        )
        for operator in ("flash3", "flash", "cutlass")
    ),
    Backend("sage", partial(_dense_why_not, "sageattention", "sageattn", largest=128), _sage, is_exact=False),
)
TORCH = Backend("torch", lambda part: "", reference.attention)


@cache
def backends() -> tuple[Backend, ...]:
    """All, in the order in which one is taken where nothing was measured."""
    names = _fused().NAMES if find_spec("triton") else ()
    own = (
        Backend(f"triton/{name}", partial(_triton_why_not, config=name), partial(_triton, config=name))
        for name in names
    )
    return (*LIBRARIES, *own, TORCH)
