"""Modules that need to run once: per step where all branches agree, per prompt where nothing else goes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from stg_engine.hooks import EngineHook
from stg_engine.layout import Rows, chunk_ranges, entries_of, join, narrow, select
from stg_engine.memo import Memo
from stg_engine.models import modules_at, modules_in_blocks
from stg_engine.rows import BlockHook, LinkHook, Run, SelfAttentionHook, Slot


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
            return in_chunks(forward, x, run.max_rows, run.rows_in_hand)
        return self.memo.get(id(self), (x,), lambda: in_chunks(forward, x, run.max_rows, run.rows_in_hand))


class OneKeyAttention(EngineHook):
    """Attention to a single token: the softmax over one key is 1, so every query gets `to_out(to_v(token))`.

    That is one vector per row, [R, 1, C], kept per prompt; it returns [R * n, 1, C] for the row's n entries, which
    broadcasts over the tokens. With `max_rows` the module runs, for the sake of its bits.
    """

    processors = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")

    def __init__(self, slot: Slot, memo: Memo) -> None:
        super().__init__()
        self.slot, self.memo = slot, memo

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        run, context = self.slot.run, kwargs.get("encoder_hidden_states")
        if (
            run is None
            or run.max_rows is not None
            or context is None
            or context.shape[1] != 1
            or kwargs.get("attention_mask") is not None
            or type(module.processor).__name__ not in self.processors
        ):
            return self.fn_ref.original_forward(*args, **kwargs)
        entries = entries_of(context, run.rows_in_hand)
        projection, dropout = module.to_out

        def attend() -> Tensor:
            return dropout(projection(module.to_v(context[::entries])))

        key = (id(self), run.names_in_hand)
        return self.memo.get(key, run.prompt, attend).repeat_interleave(entries, dim=0)


class RowsHook(EngineHook):
    """Runs a module outside the blocks on the rows that need it, `max_rows` at a time; all rows get the result.

    `carriers` are its arguments with rows: positions where the forward passes them so, because a PEFT layer in the
    module's place has other names. Which rows need it: a subclass each.
    """

    def __init__(self, slot: Slot, carriers: tuple[int | str, ...]) -> None:
        super().__init__()
        self.slot, self.carriers = slot, carriers

    def needed(self, run: Run) -> tuple[tuple[str, ...], list[int]]:
        """The branches to run on, and for each branch the place among them of its result."""
        raise NotImplementedError

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, run = self.fn_ref.original_forward, self.slot.run
        if run is None:
            return forward(*args, **kwargs)
        names, places = self.needed(run)
        total = len(run.names) * run.videos
        rows = [run.names.index(name) * run.videos + video for name in names for video in range(run.videos)]

        def of(key: int | str, value: Any, chunk: list[int]) -> Any:
            return select(value, chunk, total) if key in self.carriers else value

        parts = []
        for start, stop in chunk_ranges(len(rows), run.max_rows):
            chunk = rows[start:stop]
            positional = (of(i, arg, chunk) for i, arg in enumerate(args))
            parts.append(forward(*positional, **{name: of(name, arg, chunk) for name, arg in kwargs.items()}))
        result = _spread(join(parts), places, len(names), run.videos)
        return result if self.slot.compiler is None else _contiguous(result)  # as in steps without a guided forward


class OncePerStep(RowsHook):
    """On one branch's rows: they are equal in all."""

    def needed(self, run: Run) -> tuple[tuple[str, ...], list[int]]:
        return run.names[:1], [0] * len(run.names)


class BetweenBlocks(RowsHook):
    """On the rows of branches that differ in front of the next block."""

    def needed(self, run: Run) -> tuple[tuple[str, ...], list[int]]:
        return run.distinct()


class PerRow(RowsHook):
    """On all rows."""

    def needed(self, run: Run) -> tuple[tuple[str, ...], list[int]]:
        return run.names, list(range(len(run.names)))


class TimeEmbedding(EngineHook):
    """Maps the timesteps of one branch, each distinct value once; all branches get the result.

    Values are sought only where tokens have timesteps of their own: it waits for the device once per step, and is left
    out where a CUDA graph is captured. With `max_rows` every row keeps its full list of timesteps, so that its result
    is bitwise that of a pass run alone.
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
        if run.max_rows is None and per_video > 1 and not run.memo.is_paused:
            values, inverse = timestep.unique(return_inverse=True)
            results = tuple(result[inverse] for result in forward(values, *args, **kwargs))
        else:
            parts = [
                forward(narrow(timestep, start, stop, run.videos), *args, **kwargs)
                for start, stop in chunk_ranges(run.videos, run.max_rows)
            ]
            results = join(parts)
        return tuple(result.repeat(branches, *[1] * (result.ndim - 1)) for result in results)


def once_per_prompt(spec: Any, transformer: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules whose results follow from the prompt alone."""
    return modules_at(transformer, spec.once_per_prompt) + modules_in_blocks(blocks, spec.once_per_prompt_in_block)


def kept_modules(spec: Any, transformer: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules whose results are kept from step to step."""
    return [*once_per_prompt(spec, transformer, blocks), *modules_in_blocks(blocks, spec.one_key_attention)]


def guided_hooks(
    spec: Any, transformer: nn.Module, blocks: Sequence[nn.Module], slot: Slot, memo: Memo
) -> Iterator[tuple[nn.Module, EngineHook]]:
    """All that a guided forward needs, module by module."""
    for kind, paths in (
        (OncePerStep, spec.once_per_step),
        (BetweenBlocks, spec.between_blocks or {}),
        (PerRow, spec.per_row),
    ):
        for path, carriers in paths.items():
            yield from ((module, kind(slot, carriers)) for module in modules_at(transformer, (path,)))
    yield from ((module, TimeEmbedding(slot)) for module in modules_at(transformer, spec.time_embedding))
    for module in once_per_prompt(spec, transformer, blocks):
        yield module, OncePerPrompt(slot, memo)
    for module in modules_in_blocks(blocks, spec.one_key_attention):
        yield module, OneKeyAttention(slot, memo)
    for index, block in enumerate(blocks):
        yield block, BlockHook(slot, index)
        yield from ((module, SelfAttentionHook(slot, index)) for module in modules_at(block, spec.self_attention))
        yield from ((module, LinkHook(slot, index)) for module in modules_at(block, spec.links))


def in_chunks(forward: Callable[[Tensor], Tensor], x: Tensor, max_rows: int | None, total: int) -> Tensor:
    """`forward(x)`, at most `max_rows` of its `total` rows at a time."""
    return join([forward(narrow(x, start, stop, total)) for start, stop in chunk_ranges(total, max_rows)])


def _contiguous(value: Rows) -> Rows:
    if isinstance(value, tuple):
        return tuple(map(_contiguous, value))
    return None if value is None else value.contiguous()


def _spread(value: Rows, places: list[int], count: int, videos: int) -> Rows:
    """Rows of `count` branches -> rows of `len(places)`; a view where there is one entry for all."""
    if isinstance(value, tuple):
        return tuple(_spread(item, places, count, videos) for item in value)
    if value is None or places == list(range(count)):
        return value
    if value.shape[0] == 1:
        return value.expand(len(places), *value.shape[1:])
    rows = [place * videos + video for place in places for video in range(videos)]
    return select(value, rows, count * videos)
