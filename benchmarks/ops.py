"""Every op at true shapes: against diffusers, eager torch, torch.compile, and a copy of as many bytes, all in one run.

`python -m benchmarks.ops` appends rows to results/ops.csv. On a CUDA device at each model's full token count, kernel
times with a cold L2 (triton.testing.do_bench); on a CPU at 1,024 tokens of the models that have up to 2,048 channels.
No row is written for an implementation whose error against float64 is more than twice that of eager torch. diffusers
rounds between operations and is a baseline alone: there ROUNDINGS roundings of the largest result are allowed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import stg_kernels
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks import ltx_in_diffusers, record
from benchmarks.shapes import SHAPES, Shape
from stg_engine.bench.ceilings import copy

# glibc gives large temporaries back and maps them anew in every call: most of eager torch's time at 25 MB, which says
# nothing of kernels (norm_modulate, 3 x 1,024 x 2,048 float32: 36 ms, with memory kept 8 ms).
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
ROUNDINGS = 8
CPU_TOKENS, CPU_CHANNELS, CPU_SECONDS = 1024, 2048, 0.5


@dataclass(frozen=True)
class Case:
    """One call of an op: its arguments by name, the bytes that it must move, and whether the model is LTX-Video."""

    op: str
    arguments: dict[str, Any]
    moved: int
    is_ltx: bool


def cases(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The calls that a guided step of this model makes."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(kind)

    c, s = shape.channels, shape.tokens
    x, y, scale, shift, gate = normal(rows, s, c), normal(rows, s, c), *(normal(1, 1, c) for _ in range(3))
    one, is_ltx = x.numel() * x.element_size(), shape.model.startswith("LTX-Video")
    norm = {"subtract_mean": shape.layer_norm}
    yield Case("norm_modulate", {"x": x, "scale": scale, "shift": shift, **norm}, 2 * one, is_ltx)
    yield Case("residual_gate", {"x": x, "y": y, "gate": gate}, 3 * one, is_ltx)
    modulation = {"gate": gate, "scale": scale, "shift": shift}
    yield Case("residual_gate_norm_modulate", {"x": x, "y": y, **modulation, **norm}, 4 * one, is_ltx)
    q, k = (t.unflatten(-1, (shape.heads, shape.head_size)) for t in (x, y))
    weight = normal(shape.head_size if shape.per_head else c)
    angles = normal(1, s, 1 if shape.per_head else shape.heads, shape.head_size // 2, kind=torch.float32)
    table = {"cos": angles.cos(), "sin": angles.sin(), "per_head": shape.per_head}
    weights = {"q_weight": weight, "k_weight": weight}
    yield Case("qk_norm_rope", {"q": q, "k": k, **weights, **table}, 4 * one + 8 * angles.numel(), is_ltx)
    predictions = normal(rows, s, shape.latent)
    scales = torch.tensor([4.0, 0.7, *[1.0] * (rows - 2)], device=device)
    moved = predictions.numel() * predictions.element_size() * (rows + 1) // rows
    if rows > 1:
        guidance = {"rows": predictions, "scales": scales, "has_uncond": True}
        yield Case("combine_guidance", {**guidance, "rescale": True}, moved, is_ltx)


def implementations(case: Case, compile_too: bool) -> dict[str, Callable[[], Any]]:
    """Name -> call. "eager" is the reference: plain torch operations, float32 inside. "diffusers": for LTX-Video."""
    module = import_module(f"stg_kernels.{'residual_gate' if 'residual' in case.op else case.op}.reference")
    eager = getattr(module, case.op)
    device = next(v for v in case.arguments.values() if isinstance(v, Tensor)).device
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: eager(**case.arguments)}
    if case.is_ltx:
        calls["diffusers"] = ltx_in_diffusers.expression(case.op, case.arguments)
    if compile_too:
        compiled = torch.compile(eager, dynamic=False)
        calls["compile"] = lambda: compiled(**case.arguments)
    public = getattr(stg_kernels, case.op)
    if device.type == "cuda":
        calls["fused"] = lambda: public(**case.arguments, impl="fused")
    if device.type in stg_kernels.native_devices():
        calls["native"] = lambda: public(**case.arguments, impl="native")
    return calls


def largest_error(result: Any, exact: Any) -> float:
    pairs = zip(result, exact, strict=True) if isinstance(result, tuple) else [(result, exact)]
    return max((a.double() - b).abs().max().item() for a, b in pairs)


def timed(call: Callable[[], Any], device: torch.device, milliseconds: float = 100) -> tuple[float, float]:
    """Median and quartile range, seconds of one call; on a CUDA device repeated for about so many milliseconds."""
    if device.type == "cuda":
        from triton.testing import do_bench

        low, middle, high = do_bench(call, rep=milliseconds, quantiles=[0.25, 0.5, 0.75])
        return middle / 1e3, (high - low) / 1e3
    # A Timer runs on one thread unless it is told otherwise.
    times = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()).blocked_autorange(
        min_run_time=CPU_SECONDS
    )
    low, middle, high = statistics.quantiles(times.times, n=4) if len(times.times) > 1 else times.times * 3
    return middle, high - low


def widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def measure(case: Case, shape: Shape, rows: int, dtype: torch.dtype, compile_too: bool) -> list[record.OpRow]:
    """The rows of one case; prints a line for each, also for those that the parity gate keeps out."""
    calls = implementations(case, compile_too)
    device = next(v for v in case.arguments.values() if isinstance(v, Tensor)).device
    module = import_module(f"stg_kernels.{'residual_gate' if 'residual' in case.op else case.op}.reference")
    exact = getattr(module, case.op)(**{name: widened(value) for name, value in case.arguments.items()})
    errors = {name: largest_error(call(), exact) for name, call in calls.items()}
    results = exact if isinstance(exact, tuple) else (exact,)
    # Half a unit in the last place of the largest result: where eager happens to round well.
    rounding = torch.finfo(dtype).eps / 2 * max(r.abs().max().item() for r in results)
    del exact, results
    copy_seconds, _ = timed(copy(case.moved, device), device)
    measured, baselines = [], {}
    for name, call in calls.items():
        limit = ROUNDINGS * rounding if name == "diffusers" else 2 * (errors["eager"] + rounding)
        passed = errors[name] <= limit
        seconds, iqr = timed(call, device)
        if passed and name in record.BASELINES:
            baselines[name] = seconds
        speed, copied = case.moved / seconds / 1e9, case.moved / copy_seconds / 1e9
        ratios = ", ".join(f"{baseline / seconds:5.2f}x {other}" for other, baseline in baselines.items())
        verdict = f"{ratios}, {speed / copied:4.2f} of copy" if passed else "PARITY GATE RED"
        print(f"{case.op:28} {name:9} {rows} x {shape.model:30} {str(dtype)[6:]:9} {seconds * 1e6:9.1f} us  {verdict}")
        if passed:
            measured.append(
                record.OpRow(
                    op=case.op,
                    implementation=name,
                    model=shape.model,
                    rows=rows,
                    seconds=seconds,
                    iqr=iqr,
                    gb_per_second=speed,
                    copy_gb_per_second=copied,
                    error=errors[name],
                    budget=errors["eager"],
                    dtype=str(dtype).removeprefix("torch."),
                    **record.environment(device),
                )
            )
    return measured


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--models", default="", help="only models whose name begins with this")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 3], help="rows of a forward")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile of the eager form, too")
    parser.add_argument("--out", default=str(record.RESULTS / "ops.csv"), help="CSV file to append to")
    options = parser.parse_args()
    device, out = torch.device(options.device), Path(options.out)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is not allowed: torch finds no CUDA device here")
    if not out.absolute().parent.is_dir():
        parser.error(f"--out {options.out!r} is not allowed: its folder is not there")
    shapes = [shape for shape in SHAPES if shape.model.startswith(options.models)]
    if not shapes:
        parser.error(f"--models {options.models!r} is none of {', '.join(shape.model for shape in SHAPES)}")
    if min(options.rows) < 1:
        parser.error(f"--rows {min(options.rows)} is not allowed; at least 1 (guidance is timed from 2 on)")
    if device.type == "cpu":
        shapes = [
            replace(shape, model=f"{shape.model.split(',')[0]}, {CPU_TOKENS} tokens", tokens=CPU_TOKENS)
            for shape in shapes
            if shape.channels <= CPU_CHANNELS
        ]
        if not shapes:
            parser.error(f"--models {options.models!r} needs --device cuda: more than {CPU_CHANNELS} channels")
        if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
            command = [sys.executable, "-m", "benchmarks.ops", *sys.argv[1:]]
            os.execve(sys.executable, command, {**os.environ, **KEEP_MEMORY})
    if 1 in options.rows:
        print("combine_guidance combines two rows or more: not timed with 1")
    for shape in shapes:
        for dtype in options.dtype:
            for rows in options.rows:
                for case in cases(shape, rows, getattr(torch, dtype), device):
                    record.append(out, measure(case, shape, rows, getattr(torch, dtype), options.compile))


if __name__ == "__main__":
    main()
