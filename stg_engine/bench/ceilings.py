"""What a device reaches in a large matrix product, a large copy, and attention of a given head size and sequence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from stg_kernels import DTYPES
from stg_kernels.attention import dispatch
from stg_kernels.attention.backends import backends
from stg_kernels.attention.parts import Part
from torch import Tensor

from stg_engine.bench.cost import Ceilings

# Beyond these a product gains little: on a GPU 67 million results fill it many times over.
PRODUCT = {"cuda": 8192, "cpu": 1024}
# Read and written; far beyond the caches: 50 MB on an H100 or H200, some hundred MB in the largest CPUs.
COPIED_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
# Rows are added until a call has so much to do that neither its launch nor its last wave counts.
ATTENTION_FLOPS = {"cuda": 1e11, "cpu": 1e9}

WARM_UP, SECONDS, REPEATS = {"cuda": 0.1, "cpu": 0.05}, 0.3, 7


def measure(
    device: torch.device, dtype: torch.dtype, heads: int, head_size: int, queries: int, keys: int | None = None
) -> Ceilings:
    """The ceilings of a case, [rows, queries, heads, head_size] over `keys` (None: as many) in its attention.

    Attention is that of the fastest exact backend of `stg_kernels`, torch's SDPA among them, whatever is pinned;
    another shape may reach more or less. `ValueError` for a device other than CPU or CUDA, a dtype without kernels and
    sizes below 1, `RuntimeError` if no backend computes this attention exactly enough.
    """
    keys = queries if keys is None else keys
    if device.type not in PRODUCT:
        raise ValueError(f"device={str(device)!r} is not allowed; choose one of {', '.join(map(repr, PRODUCT))}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not allowed; choose one of {', '.join(map(str, DTYPES))}")
    sizes = {"heads": heads, "head_size": head_size, "queries": queries, "keys": keys}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size!r} is not allowed; it must be at least 1")
    with torch.no_grad():
        multiply, flops = matrix_product(dtype, device)
        matmul = flops / seconds(multiply, device)
        moved = COPIED_BYTES[device.type]
        return Ceilings(
            matmul=matmul,
            attention=_attention(device, dtype, **sizes),
            copy=moved / seconds(copy(moved, device), device),
        )


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A large matrix product, and its FLOPs."""
    n = PRODUCT[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3


def copy(moved: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that moves so many bytes: half of them read, half written."""
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)  # pages that were never written are not memory
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def _attention(device: torch.device, dtype: torch.dtype, heads: int, head_size: int, queries: int, keys: int) -> float:
    """FLOP/s."""
    rows = -(-int(ATTENTION_FLOPS[device.type]) // (4 * heads * queries * keys * head_size))
    q, k, v = (torch.randn(rows, n, heads, head_size, device=device).to(dtype) for n in (queries, keys, keys))
    part = Part(q, k, v, head_size**-0.5)
    choice = dispatch.tune(part)
    if choice is None:
        raise RuntimeError(f"no attention backend computes {rows} x {queries} x {heads} x {head_size} exactly enough")
    backend = next(backend for backend in backends() if backend.name == choice.backend)
    return part.flops / seconds(partial(backend.run, part), device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median of calls one behind another, on a device that is warm: at least REPEATS of them, and for SECONDS."""
    synchronise = partial(torch.cuda.synchronize, device) if device.type == "cuda" else (lambda: None)
    call()
    synchronise()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < WARM_UP[device.type]:
        call()
        synchronise()
        count += 1
    repeats = max(REPEATS, int(SECONDS * count / (time.perf_counter() - start)))
    if device.type == "cuda":
        with torch.cuda.device(device):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
            events[0].record()
            for event in events[1:]:
                call()
                event.record()
            synchronise()
        return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
