"""What a step must compute and move, and how long that takes at measured ceilings: a model of any family's cost.

One row of the plain transformer is run once and its operations are counted by the part of the model they belong to;
what a plan computes is so many rows of each part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from stg_engine.bench.count import Place, Work, counted
from stg_engine.hooks import is_installed
from stg_engine.inputs import check_inputs
from stg_engine.layout import chunk_ranges
from stg_engine.models import ModelSpec
from stg_engine.plan import Plan

# What the model leaves out, below, was 10 to 15 % of published times where it was compared with them.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Ceilings:
    """What a device reached: `matmul` and `attention` in FLOP/s, `copy` in bytes/s, read and written ones together."""

    matmul: float
    attention: float
    copy: float

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)!r} is not allowed; it must be above 0")

    def __str__(self) -> str:
        matmul, attention = _scaled(self.matmul, "FLOP/s"), _scaled(self.attention, "FLOP/s")
        return f"{matmul} in GEMMs, {attention} in attention, {_scaled(self.copy, 'B/s')}"


@dataclass(frozen=True)
class Cost:
    """FLOPs of GEMMs and convolutions, FLOPs of attention, and bytes moved between them."""

    gemm_flops: int = 0
    attention_flops: int = 0
    moved_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.gemm_flops + other.gemm_flops,
            self.attention_flops + other.attention_flops,
            self.moved_bytes + other.moved_bytes,
        )

    def seconds(self, ceilings: Ceilings) -> float:
        """`gemm_flops / matmul + attention_flops / attention + moved_bytes / copy`.

        A sum, not a maximum: a large GEMM or attention hides its own traffic behind its arithmetic, and the bytes stand
        for what runs between two of them. If all of that is fused, it reads what one kernel wrote and writes what the
        next one reads, once each. Weights are counted once per launch: a GEMM of few rows waits for them. So a step of
        the fastest GEMM, attention and fused elementwise kernels takes about this long.

        Left out: launches and gaps between kernels, which rule small shapes; kernels that fuse less, or more, as a GELU
        in a GEMM's epilogue; masks and rotary tables; GEMMs and cross-attention too small to reach the ceilings; norms
        and modulation of one vector per row; guidance itself; the copies that narrow and widen rows; overlap.
        """
        return (
            self.gemm_flops / ceilings.matmul
            + self.attention_flops / ceilings.attention
            + self.moved_bytes / ceilings.copy
        )

    def at(self, ceilings: Ceilings) -> str:
        """`str(self)`, the milliseconds that it takes, and the ceilings."""
        return f"{self} = {self.seconds(ceilings) * 1e3:.3g} ms at {ceilings}"

    def __str__(self) -> str:
        gemm, attention = _scaled(self.gemm_flops, "FLOP"), _scaled(self.attention_flops, "FLOP")
        return f"{gemm} GEMM + {attention} attention + {_scaled(self.moved_bytes, 'B')}"


@dataclass(frozen=True)
class BlockCosts:
    """Work of one row, by part of the model.

    parts    Place -> Work, see `Place`
    blocks   L
    """

    parts: Mapping[Place, Work]
    blocks: int

    def of(self, part: str, block: int | None = None) -> Work:
        return self.parts.get(Place(part, block), Work())


def count(transformer: nn.Module, spec: ModelSpec, shared: Mapping[str, Any], cond: Mapping[str, Any]) -> BlockCosts:
    """Work of one row, by one plain forward of one video on cond's prompt, and one `spec.attention_skip` per module.

    Needs no gradients, runs on the device of the inputs, meta included where the family's forward reads no values
    (Mochi's does). FLOPs follow from shapes: 2 m n k per GEMM, 4 D per head and pair of a query and a key; masked keys
    count as any other. `ValueError` for more than one video and for a transformer that an engine is attached to.
    """
    blocks = spec.block_list(transformer)
    if any(map(is_installed, (transformer, *blocks))):
        raise ValueError("transformer: an engine is attached to it; detach it before its cost is counted")
    videos = check_inputs(transformer, spec, shared, cond, None)
    if videos != 1:
        raise ValueError(f"shared holds {videos} videos; the cost is counted on 1")
    return BlockCosts(counted(transformer, spec, shared, cond), len(blocks))


def step_cost(
    costs: BlockCosts,
    plan: Plan | None,
    videos: int = 1,
    *,
    passes: int | None = None,
    max_rows: int | None = None,
) -> Cost:
    """What one guided step computes and moves, with kernels="off", from the second step of a prompt on.

    plan       rows per block; what follows from the prompt alone is kept and costs nothing
    passes     without a plan: plain passes of the whole transformer, nothing kept, skipped blocks computed as others
    max_rows   rows per launch, each of which reads its weights; None is all of them, `videos` passes one by one

    Equals what `counted` finds in such a step, but: rows of another prompt count as cond's, which differs where a
    forward drops padding (Mochi) or packs prompts (Open-Sora); timesteps per token count one by one, though the engine
    embeds each value once; with `max_rows` a row that skips attention may share its launch with others.
    """
    if (plan is None) == (passes is None):
        raise ValueError(f"plan={'None' if plan is None else 'a plan'} and passes={passes!r}: pass one of them")
    if videos < 1:
        raise ValueError(f"videos={videos!r} is not allowed; it must be at least 1")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows!r} is not allowed; it must be at least 1, or None")

    if plan is None:
        if passes is None or passes < 1:
            raise ValueError(f"passes={passes!r} is not allowed; it must be at least 1")
        return _passes_cost(costs, passes * videos, max_rows)
    if plan.num_blocks != costs.blocks:
        raise ValueError(f"plan has {plan.num_blocks} blocks, the transformer that was counted {costs.blocks}")

    def cost(part: str, branches: int, block: int | None = None) -> Cost:
        return _cost(costs.of(part, block), branches * videos, max_rows)

    names = [branch.name for branch in plan.branches]
    isolated = {branch.name for branch in plan.branches if branch.is_isolated}
    total = _cost(costs.of("once"), 1) + cost("once per step", 1) + cost("outside", len(names))
    for block in range(plan.num_blocks + 1):
        total += cost("between", len({plan.parent_of_rows(name, block) for name in names}), block)
    for block, rows in enumerate(plan.rows):
        twins, skipping = plan.shared_attention(block), set(plan.skipping_attention(block))
        total += cost("block", len(rows), block)
        total += cost("attention", len({twins.get(name, name) for name in rows if name not in skipping}), block)
        total += cost("skipping", len(skipping.intersection(rows)), block)
        total += cost("link", len(set(rows) - isolated), block)
        if max_rows is not None:
            total += cost("one key", len(rows), block)
    return total


def _passes_cost(costs: BlockCosts, rows: int, max_rows: int | None) -> Cost:
    total = Cost()
    for (part, _), work in costs.parts.items():
        if part == "once":
            total += sum((_cost(work, 1) for _ in chunk_ranges(rows, max_rows)), Cost())
        elif part != "skipping":
            total += _cost(work, rows, max_rows)
    return total


def _cost(work: Work, rows: int, max_rows: int | None = None) -> Cost:
    launches = len(list(chunk_ranges(rows, max_rows))) if rows else 0
    moved = work.activation_bytes * rows + work.weight_bytes * launches
    return Cost(work.gemm_flops * rows, work.attention_flops * rows, moved)


def disagreement(measured: float, ideal: float) -> str:
    """Seconds measured against `Cost.seconds`: what to say where they differ by more than TOLERANCE, else ""."""
    for name, value in (("measured", measured), ("ideal", ideal)):
        if not value > 0:
            raise ValueError(f"{name}={value!r} is not allowed; it must be above 0")
    ratio = measured / ideal
    if abs(ratio - 1) <= TOLERANCE:
        return ""
    why = (
        "launches, elementwise passes that are not fused, or kernels below their ceilings"
        if ratio > 1
        else "a ceiling measured too low, or work that was not done"
    )
    return f"{measured * 1e3:.3g} ms is {ratio:.2f}x the ideal {ideal * 1e3:.3g} ms, beyond {TOLERANCE:.0%}: {why}"


def _scaled(value: float, unit: str) -> str:
    """1.23e12, "FLOP" -> "1.23 TFLOP"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
