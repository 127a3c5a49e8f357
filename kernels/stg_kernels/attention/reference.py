"""The specification in plain torch: every score, masked; float32 arithmetic, float64 for float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stg_kernels.attention.parts import Part


def branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_rows: Sequence[int] | None = None,
    key_lengths: Tensor | None = None,
    value_rows: Sequence[int] = (),
    own_key_rows: Sequence[int] = (),
    text: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `stg_kernels.branch_attention`."""
    rows, tokens = q.shape[:2]
    sources = kv_rows or (range(rows) if k.shape[0] == rows else [0] * rows)
    results = []
    for row, source in enumerate(sources):
        if row in value_rows:
            results.append(v[source])
            continue
        allowed = torch.ones(tokens, k.shape[1], dtype=torch.bool, device=q.device)
        if key_lengths is not None:
            allowed &= torch.arange(k.shape[1], device=q.device) < key_lengths[source]
        if row in own_key_rows and text is not None:
            is_text = torch.zeros(tokens, dtype=torch.bool, device=q.device)
            is_text[text[0] : text[1]] = True
            own = torch.eye(tokens, dtype=torch.bool, device=q.device)
            allowed = torch.where(is_text[:, None], allowed, allowed & is_text | own)
        results.append(_attention(q[row], k[source], v[source], allowed, scale or q.shape[-1] ** -0.5))
    return torch.stack(results)


def _attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("snd,knd->nsk", q.to(compute), k.to(compute)) * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~allowed, 0.0)  # no key at all: 0
    values = v.to(compute).masked_fill(~allowed.any(0)[:, None, None], 0.0)  # what nothing may see may be NaN
    return torch.einsum("nsk,knd->snd", weights, values).to(q.dtype)


SCORES = 2**26
"""Held at once by `attention`, 256 MiB in float32."""


def attention(part: Part, *, low_precision: bool = False) -> Tensor:
    """[G, S, N, D] of a part, in chunks of queries; `low_precision`: every operation in the part's dtype."""
    if not part.q.numel():
        return part.q.clone()
    compute = part.q.dtype if low_precision or part.q.dtype == torch.float64 else torch.float32
    rows, queries, heads, _ = part.q.shape
    size = max(1, SCORES // max(1, heads * part.k.shape[1]))
    results = [
        torch.cat([_queries(part, row, slice(at, at + size), compute) for at in range(0, queries, size)])
        for row in range(rows)
    ]
    return torch.stack(results)


def _queries(part: Part, row: int, at: slice, compute: torch.dtype) -> Tensor:
    source = row if part.kv_rows is None else part.kv_rows[row]
    q, k, v = part.q[row, at].to(compute), part.k[source].to(compute), part.v[source].to(compute)
    scores = torch.einsum("snd,knd->nsk", q, k) * part.scale
    if part.key_lengths is not None:
        is_there = torch.arange(k.shape[0], device=k.device) < part.key_lengths[source] - part.key_start
        scores = scores.masked_fill(~is_there, -torch.inf)
        v = v.masked_fill(~is_there[:, None, None], 0.0)  # what nothing may see may be NaN
    if part.own_k is not None and part.own_v is not None:
        own_k, own_v = part.own_k[source, at].to(compute), part.own_v[source, at].to(compute)
        scores = torch.cat([scores, torch.einsum("snd,snd->ns", q, own_k)[..., None] * part.scale], -1)
        weights = scores.softmax(-1)
        result = torch.einsum("nsk,knd->snd", weights[..., :-1], v) + weights[..., -1].t()[..., None] * own_v
    else:
        weights = scores.softmax(-1)
        result = torch.einsum("nsk,knd->snd", weights.masked_fill(scores == -torch.inf, 0.0), v)  # no keys: 0
    return result.to(part.q.dtype)
