"""Attention at true shapes: every exact backend, and what `branch_attention` takes by itself, beside a matrix product.

`python -m benchmarks.attention` appends rows to results/attention.csv. Cases, by the calls that a guided step makes:

    self                       all tokens over all tokens; in a joint model video and text
    self, lengths              joint, text last: the text's padding is behind the row's key length
    own keys                   joint: the last row's video tokens see the text and themselves (`own_key_rows`)
    cross                      all tokens over the prompt's
    cross, lengths             key length 3 for uncond, 77 for cond rows
    shared keys                cross, and the rows with cond's prompt read one copy (`kv_rows`); joint models, too, for
                               comparison
    shared keys, materialised  the same with a copy per row, made before the clock runs

On a CUDA device at each model's full token count, kernel times with a cold L2 (triton.testing.do_bench); on a CPU at
512 tokens. No row is written for an exact backend whose error against float64 is more than twice that of plain torch.
What `branch_attention` takes is measured anew, whatever the user's cache folder holds.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import stg_kernels
import torch
from stg_kernels.attention import dispatch
from stg_kernels.attention.backends import backends
from stg_kernels.attention.parts import Part, split
from torch import Tensor

from benchmarks import record
from benchmarks.ops import timed
from benchmarks.shapes import SHAPES, Shape
from stg_engine.bench.ceilings import matrix_product

UNCOND_TEXT, COND_TEXT = 3, 77
CPU_TOKENS = 512
CASES = (
    "self",
    "self, lengths",
    "own keys",
    "cross",
    "cross, lengths",
    "shared keys",
    "shared keys, materialised",
)


def cases(shape: Shape, rows: int) -> list[str]:
    """Of `CASES` those that this model has with so many rows."""
    has = {
        "self, lengths": shape.joint and not shape.text_first,  # CogVideoX attends to its padding
        "own keys": shape.joint,
        "cross": not shape.joint,
        "cross, lengths": not shape.joint,
        "shared keys": rows > 1,
        "shared keys, materialised": rows > 1,
    }
    return [case for case in CASES if has.get(case, True)]


def arguments(case: str, shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Of `stg_kernels.branch_attention`. Three rows are uncond, cond, skip; two share keys as cond and skip do."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, shape.heads, shape.head_size, generator=generator, device=device).to(dtype)

    keys = shape.text if case.startswith(("cross", "shared")) else shape.sequence
    kv_rows = (0, 0) if rows == 2 else (0, *[1] * (rows - 1))
    sources = max(kv_rows) + 1 if case.startswith("shared") else rows
    given: dict[str, Any] = {
        "q": normal(rows, shape.sequence),
        "k": normal(sources, keys),
        "v": normal(sources, keys),
    }
    if case == "shared keys":
        given["kv_rows"] = kv_rows
    if case == "shared keys, materialised":
        given |= {name: given[name][list(kv_rows)] for name in "kv"}
    if case.endswith("lengths"):
        texts = [UNCOND_TEXT] * (rows > 1) + [COND_TEXT] * max(1, rows - 1)
        lengths = [keys - shape.text + min(text, shape.text) for text in texts]
        given["key_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
    if case == "own keys":
        first = 0 if shape.text_first else shape.tokens
        given |= {"own_key_rows": (rows - 1,), "text": (first, first + shape.text)}
    return given


def parts_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_rows: Any = None,
    key_lengths: Any = None,
    own_key_rows: Any = (),
    text: Any = None,
) -> list[tuple[slice, slice, Part]]:
    """Rows, queries and their part, for each kernel of a call."""
    found = split(q, k, v, kv_rows, key_lengths, (), own_key_rows, text, q.shape[-1] ** -0.5)
    return [(rows, queries, part) for rows, queries, part in found if isinstance(part, Part)]


class Clock:
    """Times calls of one model and prints a line for each.

    ceiling     FLOPs per second of a large matrix product
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, str(dtype).removeprefix("torch."), device
        multiply, work = matrix_product(dtype, device)
        self.ceiling = work / timed(multiply, device)[0]
        self.environment = record.environment(device)

    def line(self, case: str, backend: str, rows: int, verdict: str) -> None:
        print(f"{case:26} {backend:24} {rows} x {self.shape.model:28} {self.dtype:9} {verdict}", flush=True)

    def row(
        self,
        case: str,
        backend: str,
        call: Callable[[], Any],
        size: tuple[int, int, int],
        work: int,
        error: float,
        budget: float,
    ) -> record.AttentionRow:
        """`size`: rows, queries, keys; `work`: FLOPs of a call."""
        # Long calls get about ten samples, too: at half the speed of a matrix product they take twice its time.
        seconds, iqr = timed(call, self.device, max(100, 20e3 * work / self.ceiling))
        speed = work / seconds
        verdict = f"{seconds * 1e6:10.1f} us  {speed / 1e12:8.3f} TFLOP/s, {speed / self.ceiling:4.2f} of matmul"
        self.line(case, backend, size[0], f"{verdict}, error {error / budget:4.2f} of budget")
        return record.AttentionRow(
            case,
            backend,
            self.shape.model,
            *size,
            self.shape.heads,
            self.shape.head_size,
            seconds,
            iqr,
            tflops=speed / 1e12,
            matmul_tflops=self.ceiling / 1e12,
            error=error,
            budget=budget,
            dtype=self.dtype,
            **self.environment,
        )


def backend_rows(
    case: str, part: Part, sample: dispatch.Sample, clock: Clock, lossy: bool
) -> Iterator[record.AttentionRow]:
    """One part by every backend; a line says why one cannot run, or that the parity gate keeps it out."""
    rows, queries = part.q.shape[:2]
    for backend in backends():
        if (backend.name == "torch" and part.own_k is None) or not (backend.is_exact or lossy):
            continue
        reason, error = backend.why_not(part), 0.0
        if not reason:
            try:
                error = sample.error(dispatch.run(part, backend.name))
            except Exception as refusal:  # a library's own, of whatever kind
                reason = f"{type(refusal).__name__}: {refusal}".split("\n")[0]
        if reason:
            clock.line(case, backend.name, rows, f"cannot run: {reason}")
        elif backend.is_exact and not error <= sample.budget:
            red = f"PARITY GATE RED: error {error:.2e}, allowed {sample.budget:.2e}"
            clock.line(case, backend.name, rows, red)
        else:
            name = dispatch.ran(part) + " (lossy)" * (not backend.is_exact)
            size = (rows, queries, part.k.shape[1])
            yield clock.row(case, name, partial(backend.run, part), size, part.flops, error, sample.budget)


def measure(case: str, given: dict[str, Any], clock: Clock, lossy: bool) -> tuple[list[record.AttentionRow], float]:
    """A case's rows, and the seconds of its parts by the fastest exact backend each."""
    parts, measured, samples, best = parts_of(**given), [], [], 0.0
    for _, _, part in parts:
        name = case if len(parts) == 1 else f"{case}, {part.features} part"
        samples.append(dispatch.Sample(part))
        found = list(backend_rows(name, part, samples[-1], clock, lossy))
        best += min((row.seconds for row in found if not row.backend.endswith("(lossy)")), default=math.inf)
        measured += found
    call = partial(stg_kernels.branch_attention, **given)
    with dispatch.tuning():
        result = call()
    ran = dict.fromkeys(dispatch.ran(part) for _, _, part in parts)
    name = f"dispatch: {' + '.join(ran)}"
    checks = [
        (sample.error(result[rows, queries]), sample.budget)
        for sample, (rows, queries, _) in zip(samples, parts, strict=True)
    ]
    rows, queries = given["q"].shape[:2]
    del result
    if not all(error <= budget for error, budget in checks):
        clock.line(case, name, rows, "PARITY GATE RED")
        return measured, best
    worst = max(checks, key=lambda check: check[0] / check[1])
    size, work = (rows, queries, given["k"].shape[1]), sum(part.flops for _, _, part in parts)
    measured.append(clock.row(case, name, call, size, work, *worst))
    ratio = f"{measured[-1].seconds / best:.2f}" if math.isfinite(best) else "no exact backend ran"
    clock.line(case, "dispatch / best backend", rows, ratio)
    return measured, best


def with_tokens(shape: Shape, tokens: int) -> Shape:
    return replace(shape, model=f"{shape.model.split(',')[0]}, {tokens} tokens", tokens=tokens)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options, checked before anything runs: exit status 2 names the wrong one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--models", nargs="+", default=[""], help="only models whose name begins with one of these")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3], help="rows of a forward")
    parser.add_argument("--cases", nargs="+", default=[""], help="only cases whose name begins with one of these")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16", "float32"], help="on a CPU: float32")
    parser.add_argument("--tokens", type=int, help=f"tokens of the video; on a CPU {CPU_TOKENS}")
    parser.add_argument("--lossy", action="store_true", help="backends that are not exact, too, marked so")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "attention.csv", help="CSV file to append to")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is not allowed; torch sees no CUDA device here")
    for name, names in (("models", [shape.model for shape in SHAPES]), ("cases", CASES)):
        for prefix in getattr(options, name):
            if not any(known.startswith(prefix) for known in names):
                parser.error(f"--{name} {prefix!r} begins none of: {'; '.join(names)}")
    if min(options.rows) < 1:
        parser.error(f"--rows {min(options.rows)} is not allowed; at least 1")
    if options.tokens is not None and options.tokens < 1:
        parser.error(f"--tokens {options.tokens} is not allowed; at least 1")
    if not options.out.parent.is_dir() or options.out.is_dir():
        parser.error(f"--out {options.out} is not allowed; it must be a file in a folder that exists")
    if os.environ.get("STG_ATTENTION"):
        parser.error(f"STG_ATTENTION={os.environ['STG_ATTENTION']} pins a backend; unset it")
    options.dtype = options.dtype or ["bfloat16" if options.device == "cuda" else "float32"]
    options.tokens = options.tokens or (CPU_TOKENS if options.device == "cpu" else None)
    shapes = [shape for shape in SHAPES if shape.model.startswith(tuple(options.models))]
    options.shapes = shapes if options.tokens is None else [with_tokens(shape, options.tokens) for shape in shapes]
    options.cases = [case for case in CASES if case.startswith(tuple(options.cases))]
    if not any({*cases(shape, rows)} & {*options.cases} for shape in shapes for rows in options.rows):
        parser.error(f"--cases {'; '.join(options.cases)}: none of them is a call of these --models with these --rows")
    return options


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    device = torch.device(options.device)
    with TemporaryDirectory() as folder, patch.dict(os.environ, STG_ATTENTION_CACHE=f"{folder}/attention.json"):
        dispatch.choices.forget()
        for shape, name in product(options.shapes, options.dtype):
            dtype = getattr(torch, name)
            clock = Clock(shape, dtype, device)
            for rows in options.rows:
                best: dict[str, float] = {}
                for case in cases(shape, rows):
                    if case not in options.cases:
                        continue
                    given = arguments(case, shape, rows, dtype, device)
                    measured, best[case] = measure(case, given, clock, options.lossy)
                    if measured:
                        record.append(options.out, measured)
                shared, copied = (best.get(case, math.inf) for case in CASES[-2:])
                if math.isfinite(shared + copied):
                    clock.line(CASES[-2], "best / best materialised", rows, f"{shared / copied:.2f}")


if __name__ == "__main__":
    main()
