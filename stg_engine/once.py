"""Modules that need to run once: per step where all branches agree, per prompt where nothing else goes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.hooks import EngineHook
from stg_engine.memo import Memo
from stg_engine.rows import Slot, chunk_ranges, narrow


class OncePerPrompt(EngineHook):
    """Keeps the result for an input that depends on the prompt alone."""

    def __init__(self, slot: Slot, memo: Memo) -> None:
        super().__init__()
        self.slot, self.memo = slot, memo

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        forward, run = self.fn_ref.original_forward, self.slot.run
        if run is None or len(args) != 1 or kwargs:
            return forward(*args, **kwargs)
        x = args[0]
        if not self.memo.owns(x):
            return in_chunks(forward, x, run.max_rows)
        return self.memo.get(id(self), (x,), lambda: in_chunks(forward, x, run.max_rows))


class OncePerStep(EngineHook):
    """Runs on one branch's rows, the first B of K * B; all branches get the result.

    `rows` are positions, not names: a PEFT layer in the module's place has other argument names.
    """

    def __init__(self, slot: Slot, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.slot, self.rows = slot, rows

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, run = self.fn_ref.original_forward, self.slot.run
        if run is None or kwargs:
            return forward(*args, **kwargs)
        parts = [
            forward(*(narrow(arg, start, stop) if i in self.rows else arg for i, arg in enumerate(args)))
            for start, stop in chunk_ranges(run.videos, run.max_rows)
        ]
        if isinstance(parts[0], tuple):
            return tuple(_repeat(torch.cat(items), len(run.names)) for items in zip(*parts, strict=True))
        return _repeat(torch.cat(parts), len(run.names))


class TimeEmbedding(EngineHook):
    """Maps the timesteps of one branch, each distinct value once; all branches get the result.

    Values are sought only where tokens have timesteps of their own: it waits for the device once per step. With
    `max_rows` every row keeps its full list of timesteps, so that its result is bitwise that of a pass run alone.
    """

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    def new_forward(self, module: nn.Module, timestep: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        forward, run = self.fn_ref.original_forward, self.slot.run
        if run is None:
            return forward(timestep, *args, **kwargs)
        branches = len(run.names)
        timestep = timestep[: timestep.numel() // branches]
        per_video = timestep.numel() // run.videos
        if run.max_rows is None and per_video > 1:
            values, inverse = timestep.unique(return_inverse=True)
            results = tuple(result[inverse] for result in forward(values, *args, **kwargs))
        else:
            size = None if run.max_rows is None else run.max_rows * per_video
            parts = [forward(narrow(timestep, a, b), *args, **kwargs) for a, b in chunk_ranges(timestep.numel(), size)]
            results = tuple(map(torch.cat, zip(*parts, strict=True)))
        return tuple(result.repeat(branches, *[1] * (result.ndim - 1)) for result in results)


class PerRow(EngineHook):
    """Runs a module of one argument at most `max_rows` rows at a time."""

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        forward, run = self.fn_ref.original_forward, self.slot.run
        if run is None or len(args) != 1 or kwargs:
            return forward(*args, **kwargs)
        return in_chunks(forward, args[0], run.max_rows)


def in_chunks(forward: Callable[[Tensor], Tensor], x: Tensor, max_rows: int | None) -> Tensor:
    """`forward(x)`, at most `max_rows` rows of dim 0 at a time."""
    parts = [forward(narrow(x, start, stop)) for start, stop in chunk_ranges(x.shape[0], max_rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _repeat(rows: Tensor, branches: int) -> Tensor:
    if rows.shape[0] == 1:
        return rows.expand(branches, *rows.shape[1:])
    return rows.repeat(branches, *[1] * (rows.ndim - 1))
