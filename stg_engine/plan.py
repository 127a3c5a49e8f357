"""Which branches have rows of their own at which block. Pure data: no tensors, no model.

Two branches whose inputs are equal stay equal until a block treats them differently: the first skipped layer parts a
skip branch from cond, the first block that reads the prompt parts uncond from cond. Up to that block, the fork, one of
them needs no rows. This is exact: the same function of the same data is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from stg_engine.config import Skip, StepGuidance, STGConfig

ROWS, SHARED, PART, PASS = "#", ".", "+", "o"
LEGEND = {
    ROWS: "rows of its own",
    SHARED: "equal to another branch, no rows",
    PART: "rows of its own, self-attention shared",
    PASS: "passes through (residual skip), no rows",
}


@dataclass(frozen=True)
class Branch:
    """One prediction: the prompt it reads, and per skipped block the (mode, axis) of the skip."""

    name: str
    prompt: str = "cond"
    skips: Mapping[int, tuple[str, str | None]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Fork:
    """`branch` equals `parent` before `block` and gets rows of its own there."""

    branch: str
    parent: str
    block: int


@dataclass(frozen=True)
class Plan:
    """Branches x blocks -> rows.

    branches      in row order: uncond (if any), cond, skip, skip2, ...; each owns B rows for B videos
    num_blocks    L
    prompt_block  the first block that reads the prompt; `shares_attention` says whether its self-attention comes before
    """

    branches: tuple[Branch, ...]
    num_blocks: int
    prompt_block: int = 0
    shares_attention: bool = True
    title: str = ""

    @classmethod
    def build(
        cls,
        guidance: STGConfig | StepGuidance,
        num_blocks: int,
        *,
        uncond: bool = True,
        prompt_block: int = 0,
        shares_attention: bool = True,
        title: str = "",
    ) -> Plan:
        """The plan of one step. `ValueError` for a layer that the model does not have, or a config with a schedule."""
        if isinstance(guidance, STGConfig):
            if guidance.schedule is not None:
                raise ValueError("schedule has a plan per entry; use stg_engine.plan.build_plans")
            guidance = StepGuidance(tuple(skip for skip in guidance.skips if skip.scale > 0), guidance.rescale)
        for skip in guidance.skips:
            check_layers(skip, num_blocks)
        branches = [Branch("uncond", prompt="uncond")] if uncond else []
        branches.append(Branch("cond"))
        for name, skip in zip(guidance.names, guidance.skips, strict=True):
            branches.append(Branch(name, skips=dict.fromkeys(skip.layers, (skip.mode, skip.axis))))
        return cls(tuple(branches), num_blocks, prompt_block, shares_attention, title)

    @cached_property
    def forks(self) -> Mapping[str, Fork]:
        """Per branch but cond: where it forks, and from which branch (the one that it equals longest)."""
        forks: dict[str, Fork] = {}
        cond = next(branch for branch in self.branches if branch.name == "cond")
        placed = [cond]
        for branch in self.branches:
            if branch is cond:
                continue
            candidates = [(self._equal_until(branch, other), other.name) for other in placed]
            block, parent = max(candidates, key=lambda candidate: candidate[0])
            forks[branch.name] = Fork(branch.name, parent, block)
            placed.append(branch)
        return forks

    def _equal_until(self, a: Branch, b: Branch) -> int:
        for block in range(self.num_blocks):
            if a.skips.get(block) != b.skips.get(block) or (a.prompt != b.prompt and block >= self.prompt_block):
                return block
        raise ValueError(f"branches {a.name} and {b.name} never differ; drop one of them")

    @cached_property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """Per block: the branches that have rows there, in row order."""
        return tuple(
            tuple(branch.name for branch in self.branches if self._state(branch, block) in (ROWS, PART))
            for block in range(self.num_blocks)
        )

    def shared_attention(self, block: int) -> Mapping[str, str]:
        """Branches whose self-attention input in this block equals that of another branch: {branch: the other}."""
        if block != self.prompt_block or not self.shares_attention:
            return {}
        by_name = {branch.name: branch for branch in self.branches}
        return {
            name: fork.parent
            for name, fork in self.forks.items()
            if fork.block == block and by_name[name].skips.get(block) == by_name[fork.parent].skips.get(block)
        }

    def passing(self, block: int) -> tuple[str, ...]:
        """Branches that a residual skip passes through this block."""
        return tuple(branch.name for branch in self.branches if self._state(branch, block) == PASS)

    def skipping_attention(self, block: int) -> tuple[str, ...]:
        """Branches whose self-attention returns V in this block."""
        return tuple(b.name for b in self.branches if b.skips.get(block, ("",))[0] == "attention")

    def _state(self, branch: Branch, block: int) -> str:
        fork = self.forks.get(branch.name)
        if fork is not None and block < fork.block:
            return SHARED
        if branch.skips.get(block, ("",))[0] == "residual":
            return PASS
        return PART if branch.name in self.shared_attention(block) else ROWS

    @property
    def block_rows(self) -> int:
        """Rows computed per video, summed over the blocks."""
        return sum(map(len, self.rows))

    @property
    def pass_equivalents(self) -> float:
        """`block_rows / num_blocks`; running every branch on its own costs `len(branches)`."""
        return self.block_rows / self.num_blocks

    def __str__(self) -> str:
        columns = [tuple(self._state(branch, block) for branch in self.branches) for block in range(self.num_blocks)]
        ranges = [[block for block, _ in run] for _, run in groupby(enumerate(columns), key=lambda item: item[1])]
        heads = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ranges]
        table = [["blocks", *heads, ""]]
        for i, branch in enumerate(self.branches):
            table.append([branch.name, *(columns[run[0]][i] for run in ranges), self._origin(branch)])
        table.append(["rows", *(str(len(self.rows[run[0]])) for run in ranges), ""])
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        used = {state for column in columns for state in column}
        legend = [f"{mark} {meaning}" for mark, meaning in LEGEND.items() if mark in used]
        return "\n".join([*([self.title] if self.title else []), *lines, "", *legend, "", self.cost_line()])

    def _origin(self, branch: Branch) -> str:
        fork = self.forks.get(branch.name)
        if fork is None:
            return ""
        layers = ", ".join(map(str, branch.skips))
        modes = "/".join(sorted({mode for mode, _ in branch.skips.values()}))
        reason = f"{modes} skip of {layers}" if branch.skips else "its prompt enters"
        return f"forks from {fork.parent} in block {fork.block}: {reason}"

    def cost_line(self) -> str:
        """One sentence: block-rows, pass-equivalents and the bound that sharing alone gives."""
        full = self.num_blocks * len(self.branches)
        return (
            f"{self.block_rows} of {full} block-rows: {self.pass_equivalents:.2f} pass-equivalents instead of "
            f"{len(self.branches):.2f} ({full / self.block_rows:.2f}x)"
        )


class Plans(tuple[Plan, ...]):
    """The plans of a schedule's entries, in the schedule's order."""

    def __str__(self) -> str:
        """Every picture once, under the titles of the entries that have it."""
        pictures: dict[str, list[str]] = {}
        for plan in self:
            pictures.setdefault(str(replace(plan, title="")), []).append(plan.title)
        return "\n\n".join("\n".join([*titles, picture]) for picture, titles in pictures.items())


def build_plans(config: STGConfig, num_blocks: int, *, guidance_scale: float | None = None, **options: Any) -> Plans:
    """One plan per entry of `config.schedule`. Entries with guidance scale 1 have no uncond branch.

    `guidance_scale` stands in where an entry leaves it to the caller; `options` are those of `Plan.build`.
    """
    if config.schedule is None:
        raise ValueError("schedule=None is not allowed here; use Plan.build")
    plans = []
    for entry in config.schedule.entries:
        scale = guidance_scale if entry.guidance_scale is None else entry.guidance_scale
        cfg = "the caller's" if scale is None else f"{scale:g}"
        title = f"sigma {entry.sigma:g}: guidance scale {cfg}, skip scale {entry.scale:g}, rescale {entry.rescale:g}"
        options = {**options, "uncond": scale is None or scale > 1, "title": title}
        plans.append(Plan.build(config.of_entry(entry), num_blocks, **options))
    return Plans(plans)


def check_layers(skip: Skip, num_blocks: int) -> None:
    """Raise `ValueError` if `skip` names a block outside 0 .. num_blocks - 1."""
    if skip.layers[-1] >= num_blocks:
        raise ValueError(
            f"layers={skip.layers!r} is not allowed: the model has {num_blocks} blocks, 0 to {num_blocks - 1}"
        )
