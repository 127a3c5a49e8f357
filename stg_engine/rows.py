"""Narrow and widen rows at block borders: the block hook, and the state of one guided forward.

The transformer runs with rows for all branches, [K * B * n, ...] in the plan's order, the n entries of a row adjacent.
In front of block b the hook keeps the rows that `plan.rows[b]` names, copies a branch's rows from its parent where it
forks, and sets aside the rows of a branch that a residual skip passes through; behind the last block all rows are back.
Where the forward counts rows between blocks, all are back behind every block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.guard import refuse_left_out, refuse_unhooked
from stg_engine.hooks import ArgumentHook, Forward
from stg_engine.layout import Rows, chunk_ranges, each_row, index_tensor, join, narrow, select
from stg_engine.memo import Memo
from stg_engine.plan import Plan

Row = tuple[str, int]  # (branch, video)


@dataclass
class Slot:
    """What hooks share: the guided forward in progress (None: they step aside) and what compiles blocks, or None."""

    run: Run | None = None
    compiler: Any = None


class Run:
    """One guided forward.

    plan       rows per block
    spec       the family's `ModelSpec`
    videos     B
    max_rows   rows that a module gets at once; None: all of them
    memo       keeps rows selected from what depends on the prompt alone
    fused      per block: its forward built from `stg_kernels`, or None for the module's own
    prompt     the tensors that the prompt's rows follow from
    lengths    tokens of each row's prompt, int32 [K * B], or None where the mask has to say it
    full       per row, whether its prompt has no padding; empty where the mask has to say it
    """

    def __init__(
        self,
        plan: Plan,
        spec: Any,
        videos: int,
        max_rows: int | None,
        memo: Memo,
        fused: Sequence[Forward | None],
        prompt: tuple[Tensor, ...] = (),
        lengths: Tensor | None = None,
        full: Sequence[bool] = (),
    ) -> None:
        self.plan, self.spec, self.videos, self.max_rows, self.memo = plan, spec, videos, max_rows, memo
        self.fused, self.prompt, self.lengths, self.full = fused, prompt, lengths, full
        self.names = tuple(branch.name for branch in plan.branches)
        self._total = len(self.names) * videos
        self._isolated = {branch.name for branch in plan.branches if branch.is_isolated}
        self._live, self.next = self.names, 0
        self._states: dict[str, tuple[tuple[Tensor, ...], int, int]] = {}
        self._once: dict[Any, tuple[Any, Any]] = {}
        self._current: list[Row] = []
        self._attended: dict[tuple[int, Row], Rows] = {}
        self._attentions: set[int] = set()

    def block(self, index: int, module: nn.Module, forward: Forward, arguments: dict[str, Any]) -> Any:
        """Run block `index` on the rows that the plan gives it; returns what the module returns, with those rows."""
        refuse_left_out(self.spec, self.next, index)
        fused = self.fused[index]
        if fused is not None:
            forward = partial(fused, self, index, module)
        self._receive(index, tuple(arguments[name] for name in self.spec.streams))
        names = self.plan.rows[index]
        rows = self._rows(names)
        inputs = [self._streams(rows[start:stop]) for start, stop in chunk_ranges(len(rows), self.max_rows)]
        self._states = {name: self._source(name) for name in self.plan.passing(index)}
        arguments = dict(arguments)
        for name in self.spec.prompt_rows:
            arguments[name] = self._of_prompt(name, arguments.get(name))
        per_video = self.spec.shared_rows if fused is not None else ()
        carriers = tuple(name for name in self.spec.block_rows if name not in per_video)
        for name in per_video:
            arguments[name] = self._one_per_video(arguments.get(name))
        if fused is not None:
            arguments["key_lengths"] = self._lengths(inputs[0][0].device)
            carriers += ("key_lengths",)
        if self.spec.select_rows is not None and names != self.names:
            arguments.update(self.spec.select_rows(arguments, self._numbers(names), self._total))
        for name in carriers:
            if name in arguments:
                arguments[name] = self._take(arguments[name], names)
        self._attentions.clear()
        outputs = self._in_chunks(forward, arguments, rows, inputs, carriers)
        if fused is None and self.plan.skipping_attention(index):
            refuse_unhooked(index, module, SelfAttentionHook, self._attentions)
        self._attended.clear()
        self._current = []
        self._live, self.next = names, index + 1
        if self.spec.between_blocks is not None or self.next == self.plan.num_blocks:
            self._receive(self.next, outputs)
            outputs = self._streams(self._rows(self.names))
            self._live = self.names
            self._states.clear()
        return outputs if len(outputs) > 1 else outputs[0]

    @property
    def is_padded(self) -> bool:
        """False if no row in hand has padding in its prompt; a row's own answer if it is alone, whatever the batch."""
        rows = (self.names.index(name) * self.videos + video for name, video in self._current)
        return not self.full or not all(self.full[row] for row in rows)

    def distinct(self) -> tuple[tuple[str, ...], list[int]]:
        """In front of the next block: the branches that equal no other, and each branch's place among them."""
        parents = [self.plan.parent_of_rows(name, self.next) for name in self.names]
        names = tuple(name for name in self.names if name in parents)
        return names, [names.index(parent) for parent in parents]

    def _lengths(self, device: torch.device) -> Tensor | None:
        """On the device of the rows, which offloading may have moved."""
        lengths = self.lengths
        return None if lengths is None else self.once(("lengths", device), lengths, lambda: lengths.to(device))

    def videos_of_rows(self, device: torch.device) -> Tensor | None:
        """int64 [R]: the video of each row that the block in hand has; None if there is but one."""
        return None if self.videos == 1 else index_tensor(tuple(video for _, video in self._current), device)

    def skipping_attention(self, index: int) -> list[int]:
        """Those of the rows in hand that skip the self-attention of block `index`."""
        names = self.plan.skipping_attention(index)
        return [i for i, (name, _) in enumerate(self._current) if name in names]

    def _one_per_video(self, value: Any) -> Any:
        return self.once("videos", value, lambda: narrow(value, 0, self.videos, self._total))

    def _of_prompt(self, name: str, value: Any) -> Any:
        """The value in the first step with this prompt: one object, so that what follows from it is found again."""
        if value is None:
            return None
        key = ("of prompt", name, self.names, *value.shape)
        return self.once(("of prompt", name), value, lambda: self.memo.get(key, self.prompt, lambda: value))

    def once(self, name: Any, source: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, which follows from `source`, once per guided forward."""
        key = (name, id(source[0] if isinstance(source, tuple) else source))
        if key not in self._once:
            self._once[key] = (source, compute())
        return self._once[key][1]

    @property
    def rows_in_hand(self) -> int:
        """Rows of the block that runs, of all branches outside the blocks."""
        return len(self._current) or self._total

    @property
    def names_in_hand(self) -> tuple[str, ...]:
        """The branch of each of them."""
        return tuple(name for name, _ in self._current)

    def _in_chunks(
        self,
        forward: Forward,
        arguments: dict[str, Any],
        rows: list[Row],
        inputs: list[tuple[Tensor, ...]],
        carriers: Sequence[str],
    ) -> tuple[Tensor, ...]:
        """`inputs` are the streams per chunk, not joined: a row keeps its order in memory, by which kernels sum."""
        chunks = []
        for (start, stop), streams in zip(chunk_ranges(len(rows), self.max_rows), inputs, strict=True):
            self._current = rows[start:stop]
            if len(self._current) == len(rows):
                part = dict(arguments)
            else:
                chunk = range(start, stop)
                part = {k: self._select(v, chunk, len(rows)) if k in carriers else v for k, v in arguments.items()}
                if self.spec.select_rows is not None:
                    part.update(self.spec.select_rows(arguments, chunk, len(rows)))
            part.update(zip(self.spec.streams, streams, strict=True))
            output = forward(**part)
            chunks.append(output if isinstance(output, tuple) else (output,))
        return join(chunks)

    def self_attention(
        self,
        index: int,
        module: nn.Module,
        forward: Forward,
        arguments: dict[str, Any],
        carriers: Sequence[str] | None = None,
        values_again: Callable[[Sequence[int]], Tensor] | None = None,
    ) -> Any:
        """Self-attention of the current rows: once for rows with equal input, `attention_skip` for rows that skip it.

        carriers      the arguments with rows; None: the module's, as the spec says
        values_again  what rows that skip get, from V of these rows of the last call of `forward`: at its fork a branch
                      has the input, so the V, of the branch that it forks from
        """
        self._attentions.add(id(module))
        twins = self.plan.shared_attention(index)
        skipped = self.skipping_attention(index)
        if not twins and not skipped:
            return forward(**arguments)
        owners = [(twins.get(name, name), video) for name, video in self._current]
        first = {owner: i for i, owner in reversed(list(enumerate(owners))) if i not in skipped}
        attended = {row: result for (at, row), result in self._attended.items() if at == id(module)}
        missing = sorted(i for owner, i in first.items() if owner not in attended)
        if not skipped and len(missing) == len(owners) and self.max_rows is None:
            return forward(**arguments)
        carriers = self.spec.attention_rows if carriers is None else carriers

        def of_rows(rows: Sequence[int]) -> dict[str, Any]:
            return {k: select(v, rows, len(owners)) if k in carriers else v for k, v in arguments.items()}

        results: dict[Row, Rows] = {}
        if missing:
            for i, result in zip(missing, each_row(forward(**of_rows(missing)), len(missing)), strict=True):
                attended[owners[i]] = self._attended[id(module), owners[i]] = result
        if skipped:
            parents = self._forked_from(index, skipped, [owners[i] for i in missing], twins)
            if values_again is not None and parents is not None:
                values = values_again(parents)
            else:
                values = self.spec.attention_skip(module, of_rows(skipped))
            each = each_row(values, len(skipped))
            results = {self._current[i]: value for i, value in zip(skipped, each, strict=True)}
        return join(
            [
                results[row] if row in results else attended[owner]
                for row, owner in zip(self._current, owners, strict=True)
            ]
        )

    def link(self, forward: Forward, arguments: dict[str, Any]) -> Tensor:
        """Attention between modalities: zeros for rows whose modalities are isolated."""
        cut = [name in self._isolated for name, _ in self._current]
        if not any(cut):
            return forward(**arguments)
        x = arguments[self.spec.attention_rows[0]]
        kept = [i for i, is_cut in enumerate(cut) if not is_cut]
        if not kept:
            return torch.zeros_like(x)
        part = {k: select(v, kept, len(cut)) if k in self.spec.attention_rows else v for k, v in arguments.items()}
        results = iter(each_row(forward(**part), len(kept)))
        nothing = torch.zeros_like(x[: len(x) // len(cut)])
        return torch.cat([nothing if is_cut else next(results) for is_cut in cut])

    def _forked_from(
        self, index: int, skipped: Sequence[int], computed: Sequence[Row], twins: Mapping[str, str]
    ) -> list[int] | None:
        """Per skipped row, where in `computed` the row stands that it equals up to here; None if one is not there."""
        places = {row: place for place, row in enumerate(computed)}
        parents = []
        for i in skipped:
            name, video = self._current[i]
            fork = self.plan.forks.get(name)
            if fork is None or fork.block != index:
                return None
            place = places.get((twins.get(fork.parent, fork.parent), video))
            if place is None:
                return None
            parents.append(place)
        return parents

    def _receive(self, index: int, streams: tuple[Tensor, ...]) -> None:
        for position, name in enumerate(self._live):
            fork = self.plan.forks.get(name)
            if fork is None or fork.block <= index:
                self._states[name] = (streams, position * self.videos, len(self._live) * self.videos)

    def _source(self, name: str) -> tuple[tuple[Tensor, ...], int, int]:
        return self._states[name] if name in self._states else self._source(self.plan.forks[name].parent)

    def _rows(self, names: Sequence[str]) -> list[Row]:
        return [(name, video) for name in names for video in range(self.videos)]

    def _streams(self, rows: Sequence[Row]) -> tuple[Tensor, ...]:
        pieces: list[tuple[tuple[Tensor, ...], int, int, int]] = []
        for name, video in rows:
            streams, start, total = self._source(name)
            place = start + video
            if pieces and pieces[-1][0] is streams and pieces[-1][2] == place:
                pieces[-1] = (streams, pieces[-1][1], place + 1, total)
            else:
                pieces.append((streams, place, place + 1, total))
        return join([narrow(streams, start, stop, total) for streams, start, stop, total in pieces])

    def _take(self, value: Any, names: tuple[str, ...]) -> Any:
        if value is None or names == self.names:
            return value
        return self.once(names, value, lambda: self._select(value, self._numbers(names), self._total))

    def _numbers(self, names: tuple[str, ...]) -> list[int]:
        return [self.names.index(name) * self.videos + video for name in names for video in range(self.videos)]

    def _select(self, value: Any, rows: Sequence[int], total: int) -> Any:
        """`select`; of a prompt's tensor the same result in every step, so that what follows from it is found again."""
        if isinstance(value, Tensor) and self.memo.owns(value):
            return self.memo.get(("rows", *rows), (value,), lambda: select(value, rows, total))
        return select(value, rows, total)


class RunHook(ArgumentHook):
    """Hands a call inside block `index` to the guided forward in progress; without one it steps aside."""

    def __init__(self, slot: Slot, index: int) -> None:
        super().__init__()
        self.slot, self.index = slot, index

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, run = self.fn_ref.original_forward, self.slot.run
        if run is None:
            return forward(*args, **kwargs)
        return self.call(run, module, forward, self.bind(module, args, kwargs))

    def call(self, run: Run, module: nn.Module, forward: Forward, arguments: dict[str, Any]) -> Any:
        raise NotImplementedError


class BlockHook(RunHook):
    """Runs a block on the rows of the plan, see `Run.block`; compiled, also between guided forwards, if asked for."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, run, compiler = self.fn_ref.original_forward, self.slot.run, self.slot.compiler
        if compiler is not None:
            forward = compiler.forward(module, forward, "" if run is None else run.plan.changes_inside(self.index))
        if run is None:
            return forward(*args, **kwargs)
        return run.block(self.index, module, forward, self.bind(module, args, kwargs))


class SelfAttentionHook(RunHook):
    """Runs a block's self-attention on the rows that need it, see `Run.self_attention`."""

    def call(self, run: Run, module: nn.Module, forward: Forward, arguments: dict[str, Any]) -> Any:
        return run.self_attention(self.index, module, forward, arguments)


class LinkHook(RunHook):
    """Runs attention between modalities on the rows that are not isolated, see `Run.link`."""

    def call(self, run: Run, module: nn.Module, forward: Forward, arguments: dict[str, Any]) -> Any:
        return run.link(forward, arguments)
