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
    """One prediction: the prompt it reads, per skipped block the mode of the skip, and whether modalities are isolated.

    `is_isolated`: attention between video and audio is cut in every block (LTX-2's modality guidance).
    """

    name: str
    prompt: str = "cond"
    skips: Mapping[int, str] = field(default_factory=dict, hash=False)
    is_isolated: bool = False


@dataclass(frozen=True)
class Fork:
    """`branch` equals `parent` before `block` and gets rows of its own there."""

    branch: str
    parent: str
    block: int


@dataclass(frozen=True)
class Plan:
    """Branches x blocks -> rows.

    branches      in row order: uncond (if any), cond, skip, skip2, ..., modality (if on); each owns B rows for B videos
    num_blocks    L, in factorised models the spatial and the temporal ones
    axes          (None,), or ("spatial", "temporal"): the blocks of a layer, in order
    prompt_block  the first block that reads the prompt; -1: uncond and cond differ before the blocks
    shares_attention   whether the self-attention of that block comes before it reads the prompt
    is_shared     False: every branch has rows of its own from the start, what sharing is measured against
    """

    branches: tuple[Branch, ...]
    num_blocks: int
    axes: tuple[str | None, ...] = (None,)
    prompt_block: int = 0
    shares_attention: bool = True
    is_shared: bool = True
    title: str = ""

    @classmethod
    def build(
        cls,
        guidance: STGConfig | StepGuidance,
        num_layers: int,
        *,
        uncond: bool = True,
        axes: tuple[str | None, ...] = (None,),
        prompt_block: int = 0,
        shares_attention: bool = True,
        is_shared: bool = True,
        title: str = "",
    ) -> Plan:
        """The plan of one step. `ValueError` for a layer or axis that the model does not have, and for a schedule."""
        if isinstance(guidance, STGConfig):
            if guidance.schedule is not None:
                raise ValueError("schedule has a plan per entry; use stg_engine.plan.build_plans")
            skips = tuple(skip for skip in guidance.skips if skip.scale > 0)
            guidance = StepGuidance(
                skips, guidance.rescale, modality_scale=guidance.modality_scale, weak_pass=guidance.weak_pass
            )
        if guidance.needs_uncond and not uncond:
            raise ValueError(
                f"weak_pass={guidance.weak_pass!r} acts through CFG, which is off: pass a guidance scale above 1 and a "
                "negative prompt, or weak_pass='prompt'"
            )
        skipped = []
        for skip in guidance.skips:
            check_layers(skip, num_layers, axes)
            places = [i for i, axis in enumerate(axes) if skip.axis in (None, axis)]
            blocks = [layer * len(axes) + place for layer in skip.layers for place in places]
            skipped.append(dict.fromkeys(blocks, skip.mode))
        prompt = "uncond" if guidance.weak_pass == "negative_prompt" else "cond"
        in_uncond = skipped.pop() if skipped and guidance.weak_pass == "uncond" else {}
        branches = [Branch("uncond", "uncond", in_uncond)] if uncond else []
        branches.append(Branch("cond"))
        branches += [Branch(name, prompt, blocks) for name, blocks in zip(guidance.names, skipped, strict=True)]
        if guidance.modality_scale != 1:
            branches.append(Branch("modality", is_isolated=True))
        return cls(tuple(branches), num_layers * len(axes), axes, prompt_block, shares_attention, is_shared, title)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The branches in row order."""
        return tuple(branch.name for branch in self.branches)

    @cached_property
    def negative(self) -> tuple[str, ...]:
        """Those that read uncond's prompt."""
        return tuple(branch.name for branch in self.branches if branch.prompt == "uncond")

    @cached_property
    def forks(self) -> Mapping[str, Fork]:
        """Per branch but cond: where it forks, and from which branch (the one that it equals longest)."""
        forks: dict[str, Fork] = {}
        cond = next(branch for branch in self.branches if branch.name == "cond")
        placed = [cond]
        for branch in self.branches:
            if branch is cond:
                continue
            candidates = [
                (self._equal_until(branch, other), other.prompt == branch.prompt, other.name) for other in placed
            ]
            block, _, parent = max(candidates, key=lambda candidate: candidate[:2])
            forks[branch.name] = Fork(branch.name, parent, block)
            placed.append(branch)
        return forks

    def _equal_until(self, a: Branch, b: Branch) -> int:
        if not self.is_shared or (a.prompt != b.prompt and self.prompt_block < 0):
            return -1
        for block in range(self.num_blocks):
            if (
                a.skips.get(block) != b.skips.get(block)
                or a.is_isolated != b.is_isolated
                or (a.prompt != b.prompt and block >= self.prompt_block)
            ):
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
        if not self.shares_attention:
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
        return tuple(b.name for b in self.branches if b.skips.get(block) == "attention")

    def changes_inside(self, block: int) -> str:
        """What of the plan acts inside this block, in words; "" if its rows run it as it is."""
        if self.skipping_attention(block):
            return "attention skip"
        if self.shared_attention(block):
            return "self-attention shared"
        isolated = {branch.name for branch in self.branches if branch.is_isolated}
        return "modalities isolated" if isolated.intersection(self.rows[block]) else ""

    def parent_of_rows(self, name: str, block: int) -> str:
        """The branch that has rows for `name` in front of `block`: itself, or the one that it still equals."""
        fork = self.forks.get(name)
        return name if fork is None or fork.block < block else self.parent_of_rows(fork.parent, block)

    def _state(self, branch: Branch, block: int) -> str:
        fork = self.forks.get(branch.name)
        if fork is not None and block < fork.block:
            return SHARED
        if branch.skips.get(block) == "residual":
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
        heads = [self._range(run[0], run[-1]) for run in ranges]
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
        layers = ", ".join(map(self._label, branch.skips))
        modes = "/".join(sorted(set(branch.skips.values())))
        parent = next(other for other in self.branches if other.name == fork.parent)
        if not self.is_shared:
            return "shares nothing"
        reasons = ["its prompt enters"] if branch.prompt != parent.prompt else []
        reasons += [f"{modes} skip of {layers}"] if branch.skips else []
        reasons += ["its modalities are isolated"] if branch.is_isolated else []
        where = "before the blocks" if fork.block < 0 else f"in block {self._label(fork.block)}"
        return f"forks from {fork.parent} {where}: {', '.join(reasons)}"

    def _label(self, block: int) -> str:
        layer, place = divmod(block, len(self.axes))
        return f"{layer}{(self.axes[place] or '')[:1]}"

    def _range(self, first: int, last: int) -> str:
        return self._label(first) if first == last else f"{self._label(first)}-{self._label(last)}"

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


def build_plans(config: STGConfig, num_layers: int, *, guidance_scale: float | None = None, **options: Any) -> Plans:
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
        plans.append(Plan.build(config.of_entry(entry), num_layers, **options))
    return Plans(plans)


def check_layers(skip: Skip, num_layers: int, axes: tuple[str | None, ...] = (None,)) -> None:
    """Raise `ValueError` if `skip` names a layer outside 0 .. num_layers - 1, or an axis that the model does not have.

    In a factorised model axis=None is allowed in the residual mode alone, where it means the whole layer.
    """
    if skip.layers[-1] >= num_layers:
        raise ValueError(
            f"layers={skip.layers!r} is not allowed: the model has {num_layers} blocks, 0 to {num_layers - 1}"
        )
    if len(axes) == 1 and skip.axis is not None:
        raise ValueError(f"axis={skip.axis!r} is not allowed: the model has no factorised attention")
    if len(axes) > 1 and skip.axis is None and skip.mode == "attention":
        raise ValueError(
            "axis=None is not allowed with mode='attention': the model's attention is factorised; choose one of "
            f"{', '.join(map(repr, axes))}, or one branch each with extra_skips"
        )
