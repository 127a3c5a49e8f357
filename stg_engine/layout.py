"""Tensors with rows: dim 0 holds the rows one behind the other, each with one or more entries (frames, patches)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; PyTorch's allocators give at least this."""

Rows = Any
"""A tensor with rows, a tuple of them, or None."""


def narrow(value: Rows, start: int, stop: int, total: int) -> Rows:
    """Rows start..stop of `total` ones, which have one or more entries each in dim 0; None stays None.

    A view, or a copy where the view is not aligned as a tensor of its own is: kernels sum in another order there, and a
    row must not depend on its place in the batch.
    """
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(narrow(item, start, stop, total) for item in value)
    entries = entries_of(value, total)
    rows = value[start * entries : stop * entries]
    return rows.clone() if (rows.storage_offset() - value.storage_offset()) * rows.element_size() % ALIGNMENT else rows


def select(value: Rows, rows: Sequence[int], total: int) -> Rows:
    """The rows of a tensor (or of each tensor in a tuple): a view if they are adjacent, else a copy."""
    if isinstance(value, tuple):
        return tuple(select(item, rows, total) for item in value)
    if value is None or list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return narrow(value, rows[0], rows[0] + len(rows), total)
    entries = entries_of(value, total)
    return _behind_each_other([value[row * entries : (row + 1) * entries] for row in rows])


def each_row(value: Rows, total: int) -> list[Rows]:
    """The `total` rows of a tensor, or of each tensor in a tuple, apart."""
    if isinstance(value, tuple):
        return list(zip(*(each_row(item, total) for item in value), strict=True))
    return [None] * total if value is None else list(value.split(entries_of(value, total)))


def join(parts: Sequence[Rows]) -> Rows:
    """Rows behind each other; one part is returned as it is."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    return tuple(map(join, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else _behind_each_other(parts)


def _behind_each_other(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat` that keeps the order in which the parts' dimensions lie in memory: kernels sum by it."""
    first = parts[0]
    if first.is_contiguous():
        return torch.cat(list(parts))
    order = [0, *sorted(range(1, first.ndim), key=lambda dim: -first.stride(dim))]
    back = sorted(range(first.ndim), key=order.__getitem__)
    return torch.cat([part.permute(order) for part in parts]).permute(back)


def entries_of(value: Tensor, total: int) -> int:
    entries, rest = divmod(value.shape[0], total)
    if rest or not entries:
        raise ValueError(f"the ModelSpec gives rows to a tensor of shape {tuple(value.shape)}; here are {total} rows")
    return entries


def chunk_ranges(count: int, size: int | None) -> Iterator[tuple[int, int]]:
    """Borders of chunks of at most `size` rows; None is one chunk."""
    size = count if size is None else size
    return ((start, min(start + size, count)) for start in range(0, count, size))


@cache  # never dropped: a captured CUDA graph reads them
def index_tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The values as int64 on the device, copied there once."""
    return torch.tensor(values, device=device)
