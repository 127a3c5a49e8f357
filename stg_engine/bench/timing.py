"""Seconds, memory and kernels of calls, all variants in turns in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import quantiles
from typing import Any

import torch

Call = Callable[[], Any]
REPEATS, WARMUP_SECONDS = 20, 1.0
L2_BYTES = 64 * 2**20
"""Where a device does not say how large its cache is."""
ATTENTION = ("attention", "attn", "fmha", "flash", "sdpa", "cudnn_generated")
"""What names of attention kernels hold, in any case of letters."""


class Raised(RuntimeError):
    """The function `name` raised; its exception is the cause."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} raised")
        self.name = name


def interleaved(
    functions: Mapping[str, Call],
    device: torch.device,
    repeats: int = REPEATS,
    *,
    warmup_seconds: float = WARMUP_SECONDS,
    cold_l2: bool = False,
    on_progress: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each function.

    Each is first called until `warmup_seconds` have passed, once at least. A round then calls every function once, a
    machine that slows down slows all of them; each round begins one further, so that none stands always first, and
    every other round goes backwards, so that none follows always the same one. A sample is the time between two CUDA
    events, on a CPU that of the clock. `cold_l2` overwrites the cache before each, outside of it. Python's garbage
    collector rests. `on_progress` is called with the name behind each sample. `Raised` names a function that raises.
    """
    named = {name: partial(_named, name, function) for name, function in functions.items()}
    flush = _flush(device) if cold_l2 else None
    for function in named.values():
        start = time.perf_counter()
        while True:
            function()
            synchronize(device)
            if time.perf_counter() - start >= warmup_seconds:
                break
    samples: dict[str, list[float]] = {name: [] for name in functions}
    with without_gc():
        for number in range(repeats):
            for name in turns(list(functions), number):
                if flush is not None:
                    flush()
                samples[name].append(seconds(named[name], device))
                on_progress(name)
    return samples


def _named(name: str, function: Call) -> None:
    try:
        function()
    except Exception as error:
        raise Raised(name) from error


def turns(names: list[str], number: int) -> list[str]:
    """The order of a round: rotated by its number, backwards in every other one."""
    first = number % len(names) if names else 0
    order = names[first:] + names[:first]
    return order[::-1] if number % 2 else order


def seconds(function: Call, device: torch.device) -> float:
    """Of one call, the device waited for before and after."""
    synchronize(device)
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(torch.cuda.current_stream(device))
        function()
        last.record(torch.cuda.current_stream(device))
        synchronize(device)
        return first.elapsed_time(last) / 1e3
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of two samples, both and their mean."""
    low, middle, high = quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return max(low, min(samples)), middle, min(high, max(samples))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def without_gc() -> Iterator[None]:
    """Python's garbage collector runs before and not inside."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def peak_bytes(function: Call, device: torch.device) -> int | None:
    """Allocated during a call beyond what lay there before; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def held_bytes(device: torch.device) -> int | None:
    """Taken from the device and in use, pools of CUDA graphs included; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def launches(function: Call, device: torch.device) -> tuple[int, str] | None:
    """Kernels of a call, and the names of those that compute attention, each with its number; None on a CPU.

    Copies and fills count as kernels; a CUDA graph's kernels count one by one.
    """
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        synchronize(device)
    names = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(names), attention_kernels(names)


def attention_kernels(names: list[str]) -> str:
    """Those of kernels' names that are attention's, short, each with its number."""
    counts: dict[str, int] = {}
    for name in names:
        is_inductor = name.startswith("triton_")  # these are named after all operators that they stand for
        if not is_inductor and any(word in name.lower() for word in ATTENTION):
            short = name.removeprefix("void ").split("<")[0].split("(")[0]
            counts[short] = counts.get(short, 0) + 1
    return "; ".join(f"{count} x {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _flush(device: torch.device) -> Call:
    """Writes more than the last cache holds."""
    size = L2_BYTES
    if device.type == "cuda":
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or size
    buffer = torch.empty(2 * size, dtype=torch.uint8, device=device)
    return buffer.zero_
