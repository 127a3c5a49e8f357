"""Every Triton kernel, in every form that a model launches, compiled for sm_80, sm_90 and sm_100 without a GPU.

`python -m benchmarks.compile_kernels resources.csv` writes registers, stack, shared memory and access widths of
each; a stack above 0 is a spill. Launchers run on tensors without memory and are overheard, so that what is compiled is
what is launched; those of a fused block by its forward itself.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from stg_kernels import DTYPES
from stg_kernels.attention import fused as attention
from stg_kernels.attention.parts import Part
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.blocks import has_fused_block, run_fused_block
from benchmarks.shapes import SHAPES, Shape

TARGETS = (80, 90, 100)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
MATRIX = ("wgmma", "tcgen05.mma", "mma.sync")
OPS = ("norm_modulate", "residual_gate", "qk_norm_rope", "combine_guidance")
MODULES = {name: import_module(f"stg_kernels.{name}.fused") for name in OPS} | {"attention": attention}


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: registers per thread, bytes of stack and shared memory, bits of its global accesses,
    and the instruction of its matrix products."""

    kernel: str
    form: str
    warps: int
    target: int
    registers: int
    stack: int
    shared: int
    vectors: str
    scalars: str
    matrix: str


@dataclass(frozen=True)
class Launch:
    """targets: those that the launcher takes the form to."""

    kernel: Any
    form: str
    arguments: tuple
    options: dict[str, Any]
    targets: tuple[int, ...] = TARGETS


def overheard(form: str, call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` makes of the kernels of all ops."""
    launches: list[Launch] = []

    def record(kernel: Any) -> Any:
        class Kernel:
            def __getitem__(self, grid: Any) -> Callable:
                return lambda *args, **options: launches.append(Launch(kernel, form, args, options))

        return Kernel()

    with ExitStack() as stack:
        for module in MODULES.values():
            kernels = {name: record(value) for name, value in vars(module).items() if name.endswith("_kernel")}
            checks = {"check_device": lambda x: None} if hasattr(module, "check_device") else {}
            stack.enter_context(mock.patch.multiple(module, **checks, **kernels))
        call()
    return launches


def launches_of(shape: Shape, dtype: torch.dtype) -> Iterator[Launch]:
    """All ops as this model launches them."""
    form = f"{shape.model.split(',')[0]}, {str(dtype).removeprefix('torch.')}"

    def new(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    c = shape.channels
    x, vector, weight = new(2, 16, c), new(2, 1, c), new(c)
    row_map = new(2, kind=torch.int64)
    if has_fused_block(shape):
        for videos in (row_map, None):
            words = "block of several videos" if videos is not None else "block"
            yield from overheard(f"{form}, {words}", partial(run_fused_block, shape, dtype, videos))
    norm, residual = MODULES["norm_modulate"], MODULES["residual_gate"]
    for words, options in (
        ("modulated", {"scale": vector, "shift": vector, "row_map": row_map}),
        ("weight", {"weight": weight}),
        ("layer", {"weight": weight, "bias": weight, "subtract_mean": True}),
    ):
        yield from overheard(f"{form}, {words}", lambda o=options: norm.norm_modulate(x, **o))
    keep = new(2, kind=torch.bool)
    yield from overheard(f"{form}, gate", lambda: residual.residual_gate(x, x, vector))
    yield from overheard(f"{form}, passing", lambda: residual.residual_gate(x, x, None, None, keep))
    yield from overheard(
        f"{form}, gate and norm",
        lambda: residual.residual_gate_norm_modulate(
            x, x, vector, vector, vector, weight, weight, subtract_mean=shape.layer_norm, row_map=row_map
        ),
    )
    q, normed = new(2, 16, shape.heads, shape.head_size), new(shape.head_size if shape.per_head else c)
    table = new(1, 16, 1 if shape.per_head else shape.heads, shape.head_size // 2, kind=torch.float32)
    rope = MODULES["qk_norm_rope"]
    for interleaved in (True, False):
        arguments = {"q_weight": normed, "k_weight": normed, "cos": table, "sin": table, "per_head": shape.per_head}
        if shape.layer_norm and shape.per_head:
            arguments |= {"q_bias": normed, "k_bias": normed, "subtract_mean": True}
        words = f"{form}, {'interleaved' if interleaved else 'split'}"
        yield from overheard(words, lambda a=arguments, i=interleaved: rope.qk_norm_rope(q, q, interleaved=i, **a))
    combine, rows, scales = MODULES["combine_guidance"], new(6, 512, shape.latent), new(3, kind=torch.float32)
    for options in (
        {},
        {"rescale": True},
        {"rescale": True, "over_batch": True},
        {"cfg_star": True},
        {"rescale": True, "cfg_star": True},
        {"rescale": True, "over_batch": True, "cfg_star": True},
        {"dtype": torch.float32},
        {"rescale": True, "dtype": torch.float32},
    ):
        words = f"{form}, {', '.join(options) or 'plain'}"
        yield from overheard(words, lambda o=options: combine.combine_guidance(rows, scales, True, **o))
    euler = {"latents": new(2, 512, shape.latent), "dt": new(1, kind=torch.float32)}
    yield from overheard(f"{form}, Euler", lambda: combine.combine_guidance(rows, scales, True, **euler))


def attention_launches(shape: Shape) -> Iterator[Launch]:
    """Every config of attention for this head size, dense, with everything that rows may have, and with own keys."""
    q = torch.empty(3, 1024, shape.heads, shape.head_size, dtype=torch.bfloat16, device="meta")
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    dense = Part(q, q, q, scale=1.0)
    rows = replace(dense, kv_rows=(0, 2, 1), key_lengths=lengths)
    parts = {"dense": dense, "rows": rows, "own keys": replace(rows, own_k=q, own_v=q)}
    for config in attention.CONFIGS[attention.block_d(shape.head_size)]:
        targets = tuple(target for target in TARGETS if target // 10 in config.majors)
        for words, part in parts.items():
            if config.descriptors and part.own_k is not None:
                continue
            form = f"D={shape.head_size}, {config.name}, {words}"
            for launch in overheard(form, partial(attention.launch, part, config, q)):
                yield replace(launch, targets=targets)


def compiled(launch: Launch, target: int) -> Resources:
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False)) | launch.options
    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    signature = {n: "constexpr" if n in constants else _type(values[n]) for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if isinstance(values[n], Tensor)}
    source = ASTSource(launch.kernel, signature, {n: values[n] for n in constants}, aligned)
    warps = launch.options["num_warps"]
    options = {name: value for name, value in launch.options.items() if name.startswith("num_")}
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, stack = _usage(binary.asm["cubin"])
    accesses = (" ".join(map(str, widths)) for widths in _accesses(binary.asm["ptx"]))
    shared = binary.metadata.shared
    matrix = next((name for name in MATRIX if f"{name}." in binary.asm["ptx"]), "")
    return Resources(launch.kernel.__name__, launch.form, warps, target, registers, stack, shared, *accesses, matrix)


def _type(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _accesses(ptx: str) -> tuple[list[int], list[int]]:
    """Bits of the global accesses to vectors and to scalars, each width once: `ld.global.v4.b32` has 128."""
    found = re.findall(r"(?:ld|st)\.global(?:\.[a-zA-Z_:0-9]+)*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
    vectors = {int(count) * int(width) for count, width in found if count}
    return sorted(vectors), sorted({int(width) for count, width in found if not count})


def _usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text!r}")
    return int(found[1]), int(found[2])


def all_launches() -> dict[tuple, Launch]:
    """One per distinct kernel binary: models with equal sizes share theirs."""
    distinct: dict[tuple, Launch] = {}
    for shape in SHAPES:
        for dtype in DTYPES:
            for launch in launches_of(shape, dtype):
                kinds = tuple(v.dtype if isinstance(v, Tensor) else type(v) for v in launch.arguments)
                distinct.setdefault((launch.kernel, kinds, tuple(sorted(launch.options.items()))), launch)
        for launch in attention_launches(shape):
            distinct.setdefault((launch.kernel, launch.form), launch)
    return distinct


def main(path: str) -> None:
    rows = [compiled(launch, target) for launch in all_launches().values() for target in launch.targets]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Resources)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    main(sys.argv[1])
