"""Narrow and widen rows at block borders: the block hook, and the state of one guided forward.

The transformer runs with rows for all branches, [K * B, ...] in the plan's order. In front of block b the hook keeps
the rows that `plan.rows[b]` names, copies a branch's rows from its parent where it forks, and sets aside the rows of a
branch that a residual skip passes through; behind the last block all rows are back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.hooks import ArgumentHook, Forward
from stg_engine.memo import Memo
from stg_engine.plan import Plan

Row = tuple[str, int]
"""(branch, video)"""


@dataclass
class Slot:
    """What the hooks of one transformer share: the guided forward in progress, or None: then every hook steps aside."""

    run: Run | None = None


class Run:
    """One guided forward.

    plan       rows per block
    spec       the family's `ModelSpec`
    videos     B
    max_rows   rows that a module gets at once; None: all of them
    memo       keeps rows selected from what depends on the prompt alone
    fused      per block: its forward built from `stg_kernels`, or None for the module's own
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
        lengths: Tensor | None = None,
        full: Sequence[bool] = (),
    ) -> None:
        self.plan, self.spec, self.videos, self.max_rows, self.memo = plan, spec, videos, max_rows, memo
        self.fused, self.lengths, self.full = fused, lengths, full
        self.names = tuple(branch.name for branch in plan.branches)
        self._live = self.names
        self._states: dict[str, tuple[tuple[Tensor, ...], int]] = {}
        self._once: dict[Any, tuple[Any, Any]] = {}
        self._current: list[Row] = []
        self._attended: dict[Row, Tensor] = {}

    def block(self, index: int, module: nn.Module, forward: Forward, arguments: dict[str, Any]) -> Any:
        """Run block `index` on the rows that the plan gives it; returns what the module returns, with those rows."""
        fused = self.fused[index]
        if fused is not None:
            forward = partial(fused, self, index, module)
        self._receive(index, tuple(arguments[name] for name in self.spec.streams))
        names = self.plan.rows[index]
        inputs = self._streams(names)
        self._states = {name: self._source(name) for name in self.plan.passing(index)}
        arguments = dict(arguments)
        per_video = self.spec.shared_rows if fused is not None else ()
        carriers = tuple(name for name in self.spec.block_rows if name not in per_video)
        for name in per_video:
            arguments[name] = self._one_per_video(arguments.get(name))
        if fused is not None:
            arguments["key_lengths"] = self._lengths(inputs[0].device)
            carriers += ("key_lengths",)
        for name in carriers:
            arguments[name] = self._take(arguments.get(name), names)
        arguments.update(zip(self.spec.streams, inputs, strict=True))
        rows = [(name, video) for name in names for video in range(self.videos)]
        outputs = self._in_chunks(forward, arguments, rows, (*self.spec.streams, *carriers))
        self._attended.clear()
        self._live = names
        if index == self.plan.num_blocks - 1:
            self._receive(index + 1, outputs)
            outputs = self._streams(self.names)
            self._states.clear()
        return outputs if len(outputs) > 1 else outputs[0]

    @property
    def is_padded(self) -> bool:
        """False if no row in hand has padding in its prompt; a row's own answer if it is alone, whatever the batch."""
        rows = (self.names.index(name) * self.videos + video for name, video in self._current)
        return not self.full or not all(self.full[row] for row in rows)

    def _lengths(self, device: torch.device) -> Tensor | None:
        """On the device of the rows, which offloading may have moved."""
        lengths = self.lengths
        return None if lengths is None else self.once(("lengths", device), lengths, lambda: lengths.to(device))

    def videos_of_rows(self, device: torch.device) -> Tensor | None:
        """int64 [R]: the video of each row that the block in hand has; None if there is but one."""
        return None if self.videos == 1 else _index(tuple(video for _, video in self._current), device)

    def _one_per_video(self, value: Any) -> Any:
        return self.once("videos", value, lambda: narrow(value, 0, self.videos))

    def once(self, name: Any, source: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, which follows from `source`, once per guided forward."""
        key = (name, id(source[0] if isinstance(source, tuple) else source))
        if key not in self._once:
            self._once[key] = (source, compute())
        return self._once[key][1]

    def _in_chunks(
        self, forward: Forward, arguments: dict[str, Any], rows: list[Row], carriers: Sequence[str]
    ) -> tuple[Tensor, ...]:
        chunks = []
        for start, stop in chunk_ranges(len(rows), self.max_rows):
            self._current = rows[start:stop]
            if len(self._current) == len(rows):
                part = arguments
            else:
                rows_at_once = range(start, stop)
                part = {k: self._select(v, rows_at_once) if k in carriers else v for k, v in arguments.items()}
            output = forward(**part)
            chunks.append(output if isinstance(output, tuple) else (output,))
        return chunks[0] if len(chunks) == 1 else tuple(map(torch.cat, zip(*chunks, strict=True)))

    def self_attention(
        self,
        index: int,
        module: nn.Module,
        forward: Forward,
        arguments: dict[str, Any],
        carriers: Sequence[str] | None = None,
        values_again: Callable[[Sequence[int]], Tensor] | None = None,
    ) -> Tensor:
        """Self-attention of the current rows: once for rows with equal input, V alone for rows that skip it.

        carriers      the arguments with one entry per row, the input first; None: the module's, as the spec says
        values_again  what rows that skip get, from V of these rows of the last call of `forward`: at its fork a branch
                      has the input, so the V, of the branch that it forks from
        """
        twins = self.plan.shared_attention(index)
        skipping = self.plan.skipping_attention(index)
        if not twins and not skipping:
            return forward(**arguments)
        owners = [(twins.get(name, name), video) for name, video in self._current]
        skipped = [i for i, (name, _) in enumerate(self._current) if name in skipping]
        first = {owner: i for i, owner in reversed(list(enumerate(owners))) if i not in skipped}
        missing = sorted(i for owner, i in first.items() if owner not in self._attended)
        if not skipped and len(missing) == len(owners) and self.max_rows is None:
            return forward(**arguments)
        carriers = self.spec.attention_rows if carriers is None else carriers
        results: dict[Row, Tensor] = {}
        if missing:
            part = {k: select(v, missing) if k in carriers else v for k, v in arguments.items()}
            for i, result in zip(missing, forward(**part).split(1), strict=True):
                self._attended[owners[i]] = result
        if skipped:
            parents = self._forked_from(index, skipped, [owners[i] for i in missing], twins)
            if values_again is not None and parents is not None:
                values = values_again(parents)
            else:
                values = self.spec.value_passthrough(module, select(arguments[carriers[0]], skipped))
            results = {self._current[i]: value for i, value in zip(skipped, values.split(1), strict=True)}
        return torch.cat(
            [
                results[row] if row in results else self._attended[owner]
                for row, owner in zip(self._current, owners, strict=True)
            ]
        )

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
            if index > 0 or fork is None or fork.block == 0:
                self._states[name] = (streams, position * self.videos)

    def _source(self, name: str) -> tuple[tuple[Tensor, ...], int]:
        return self._states[name] if name in self._states else self._source(self.plan.forks[name].parent)

    def _streams(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        pieces: list[tuple[tuple[Tensor, ...], int, int]] = []
        for name in names:
            streams, start = self._source(name)
            if pieces and pieces[-1][0] is streams and pieces[-1][2] == start:
                pieces[-1] = (streams, pieces[-1][1], start + self.videos)
            else:
                pieces.append((streams, start, start + self.videos))
        parts = [tuple(narrow(stream, start, stop) for stream in streams) for streams, start, stop in pieces]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def _take(self, value: Any, names: tuple[str, ...]) -> Any:
        if value is None or names == self.names:
            return value
        rows = [self.names.index(name) * self.videos + video for name in names for video in range(self.videos)]
        return self.once(names, value, lambda: self._select(value, rows))

    def _select(self, value: Any, rows: Sequence[int]) -> Any:
        """`select`; of a prompt's tensor the same result in every step, so that what follows from it is found again."""
        if isinstance(value, Tensor) and self.memo.owns(value):
            return self.memo.get(("rows", *rows), (value,), lambda: select(value, rows))
        return select(value, rows)


ALIGNMENT = 64
"""Bytes; PyTorch's allocators give at least this."""


def narrow(value: Any, start: int, stop: int) -> Any:
    """Rows start..stop of a tensor or of each tensor in a tuple; None stays None.

    A view, or a copy where the view is not aligned as a tensor of its own is: kernels sum in another order there, and a
    row must not depend on its place in the batch.
    """
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(narrow(item, start, stop) for item in value)
    rows = value[start:stop]
    return rows.clone() if (rows.storage_offset() - value.storage_offset()) * rows.element_size() % ALIGNMENT else rows


def select(value: Any, rows: Sequence[int]) -> Any:
    """The rows of a tensor (or of each tensor in a tuple): a view if they are adjacent, else a copy."""
    if isinstance(value, tuple):
        return tuple(select(item, rows) for item in value)
    if value is None or list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return narrow(value, rows[0], rows[0] + len(rows))
    return torch.cat([value[row : row + 1] for row in rows])


def chunk_ranges(count: int, size: int | None) -> Iterator[tuple[int, int]]:
    """Borders of chunks of at most `size` rows; None is one chunk."""
    size = count if size is None else size
    return ((start, min(start + size, count)) for start in range(0, count, size))


class BlockHook(ArgumentHook):
    """Runs a block on the rows of the plan, see `Run.block`."""

    def __init__(self, slot: Slot, index: int) -> None:
        super().__init__()
        self.slot, self.index = slot, index

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        if self.slot.run is None:
            return forward(*args, **kwargs)
        return self.slot.run.block(self.index, module, forward, self.bind(module, args, kwargs))


class SelfAttentionHook(ArgumentHook):
    """Runs a block's self-attention on the rows that need it, see `Run.self_attention`."""

    def __init__(self, slot: Slot, index: int) -> None:
        super().__init__()
        self.slot, self.index = slot, index

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, run = self.fn_ref.original_forward, self.slot.run
        if run is None:
            return forward(*args, **kwargs)
        return run.self_attention(self.index, module, forward, self.bind(module, args, kwargs))


@lru_cache(maxsize=256)
def _index(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
