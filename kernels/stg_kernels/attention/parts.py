"""Rows of a call that are alike, as views: the problem that a backend solves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Softmax attention of queries q [G, S, N, D] over keys and values k, v [T, K, N, D].

    scale         of the scores q k
    kv_rows       per row of q its row of k and v; None: row i has row i
    key_lengths   int32 [T]: a row has keys 0 <= key_start + j < key_lengths, j < K; None: all K
    own_k, own_v  [T, S, N, D]: further key and value that query i alone has, or None
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    kv_rows: tuple[int, ...] | None = None
    key_lengths: Tensor | None = None
    key_start: int = 0
    own_k: Tensor | None = None
    own_v: Tensor | None = None

    @property
    def features(self) -> str:
        """What makes it more than dense attention, for keys and reports."""
        names = {
            "shared keys": self.kv_rows is not None,
            "lengths": self.key_lengths is not None,
            "own keys": self.own_k is not None,
        }
        return ", ".join(name for name, is_on in names.items() if is_on) or "dense"

    @property
    def flops(self) -> int:
        """4 D per head and pair of a query and a key that exists. Waits for the device where there are key lengths."""
        rows, queries, heads, head_size = self.q.shape
        keys = torch.full((self.k.shape[0],), self.k.shape[1], device="cpu")
        if self.key_lengths is not None and not self.key_lengths.is_meta:
            keys = keys.minimum((self.key_lengths.cpu() - self.key_start).clamp(min=0))
        seen = int(keys[list(self.kv_rows or range(rows))].sum()) + rows * (self.own_k is not None)
        return 4 * seen * queries * heads * head_size

    @property
    def shared_row(self) -> bool:
        """True if all rows read the one row that k and v have."""
        return self.kv_rows is not None and self.k.shape[0] == 1


def of_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of these rows. `x[[...]]` would wait for a GPU, to which it copies the list."""
    return torch.stack([x[row] for row in rows])


def split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_rows: Sequence[int] | None,
    key_lengths: Tensor | None,
    value_rows: Sequence[int],
    own_key_rows: Sequence[int],
    text: Sequence[int] | None,
    scale: float,
) -> Iterator[tuple[slice, slice, Part | Tensor]]:
    """Rows, queries, and their part, or the values that are their result; together every row and query once."""
    rows, tokens = q.shape[:2]
    kinds = ["value" if row in value_rows else "own" if row in own_key_rows else "all" for row in range(rows)]
    for kind, group in groupby(range(rows), kinds.__getitem__):
        first, *_ = members = list(group)
        at = slice(first, members[-1] + 1)
        sources = members if kv_rows is None and k.shape[0] == rows else [kv_rows[i] if kv_rows else 0 for i in members]
        keys, values, lengths = k, v, key_lengths
        mapping: tuple[int, ...] | None = tuple(sources)
        if sources == list(range(sources[0], sources[0] + len(sources))) or len(set(sources)) == 1:
            kept = slice(sources[0], sources[-1] + 1)
            keys, values = k[kept], v[kept]
            lengths = None if key_lengths is None else key_lengths[kept]
            mapping = None if len(values) == len(members) else (0,) * len(members)
        if kind == "value":
            yield at, slice(None), values if mapping is None else of_rows(values, mapping)
            continue
        part = Part(q[at], keys, values, scale, mapping, lengths)
        if kind == "all" or text is None:
            yield at, slice(None), part
            continue
        start, stop = text
        for queries in (slice(0, start), slice(stop, tokens)):
            if queries.start < queries.stop:
                yield (
                    at,
                    queries,
                    replace(
                        part,
                        q=part.q[:, queries],
                        k=keys[:, start:stop],
                        v=values[:, start:stop],
                        key_start=start,
                        own_k=keys[:, queries],
                        own_v=values[:, queries],
                    ),
                )
        if start < stop:
            yield at, slice(start, stop), replace(part, q=part.q[:, start:stop])
