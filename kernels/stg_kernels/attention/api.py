"""Softmax attention for the rows of a guided forward."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import SupportsIndex

import torch
from torch import Tensor

from stg_kernels.choose import DTYPES, check_floating

SKIPS = ("value_rows", "own_key_rows")


def branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_rows: Sequence[int] | None = None,
    key_lengths: Tensor | None = None,
    value_rows: Sequence[int] = (),
    own_key_rows: Sequence[int] = (),
    text: tuple[int, int] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`softmax(scale q k^T) v` per row and head, [R, S, N, D]; rows may share keys or skip the attention.

    q             [R, S, N, D] float32, bfloat16, float16 (float64: plain torch); the last dimension contiguous
    k, v          [T, K, N, D] of q's dtype on its device; T = R, or 1, which all rows read, unless kv_rows says more
    kv_rows       per row of q the row of k and v that it reads: branches with one prompt read one copy
    key_lengths   int32 [T] on q's device: the row's keys are the first ones, clamped to 0..K; no keys give 0. It is
                  read when the kernel runs: nothing waits, and a captured CUDA graph follows its values
    value_rows    rows whose result is v, the values of their own tokens (arXiv 2411.18664 Eq. 17); K = S
    own_key_rows  rows whose tokens see their own key and those of `text` alone, O(S T); the tokens of `text` itself
                  see all keys (STG's attention skip in joint attention, junhahyung/STGuidance); K = S
    text          first and last + 1 token of the text in a joint sequence
    scale         None: D^-0.5
    backend       None: `$STG_ATTENTION` if set, else the one measured fastest, see `tuning`; a name pins one: a family
                  ("sdpa", "triton", "flash-attn-3", ...) or a member ("sdpa/cudnn", "triton/128x64", ...), or the
                  first of several that can run, "sage,sdpa"; "reference" is the specification

    Float32 scores, softmax and sums. No gradients. Raises `ValueError` for shapes, dtypes, rows or names other than
    these, `RuntimeError` that says why if the pinned backend cannot run.
    """
    check_floating(q=q, k=k, v=v)
    if q.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"q has dtype {q.dtype}; it must be float32, bfloat16, float16 or float64")
    _check_shapes(q, k, v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError("branch_attention has no gradients; call it under torch.no_grad()")
    rows, tokens = q.shape[:2]
    kv_rows = None if kv_rows is None else _integers("kv_rows", kv_rows, k.shape[0])
    if kv_rows is None and k.shape[0] not in (rows, 1):
        raise ValueError(f"k has {k.shape[0]} rows; without kv_rows it must have {rows}, as q, or 1")
    if kv_rows is not None and len(kv_rows) != rows:
        raise ValueError(f"kv_rows={kv_rows} is not allowed; it must have one entry per row of q, {rows}")
    if key_lengths is not None and not isinstance(key_lengths, Tensor):
        raise TypeError(f"key_lengths={key_lengths!r} is not allowed; it must be a tensor")
    if key_lengths is not None and (
        key_lengths.dtype != torch.int32 or key_lengths.shape != k.shape[:1] or key_lengths.device != q.device
    ):
        raise ValueError(
            f"key_lengths is {key_lengths.dtype} {tuple(key_lengths.shape)} on {key_lengths.device}; it must be int32 "
            f"[{k.shape[0]}] on {q.device}"
        )
    value_rows, own_key_rows = (
        _integers(name, given, rows) for name, given in zip(SKIPS, (value_rows, own_key_rows), strict=True)
    )
    if set(value_rows) & set(own_key_rows):
        raise ValueError(f"own_key_rows={own_key_rows} is not allowed; value_rows={value_rows} must be other rows")
    if (value_rows or own_key_rows) and k.shape[1] != tokens:
        raise ValueError(f"k has {k.shape[1]} tokens; with value_rows or own_key_rows it must have {tokens}, as q")
    if bool(own_key_rows) != (text is not None):
        raise ValueError(f"text={text} and own_key_rows={own_key_rows} go together; pass both or neither")
    borders = None if text is None else _integers("text", text, tokens + 1)
    if borders is not None and (len(borders) != 2 or borders[0] > borders[1]):
        raise ValueError(
            f"text={text} is not allowed; it must be (first, last + 1) with 0 <= first <= last + 1 <= {tokens}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale} is not allowed; it must be a finite number above 0")
    arguments = (q, k, v, kv_rows, key_lengths, value_rows, own_key_rows, borders, scale)
    is_autocast = q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)
    with torch.autocast(q.device.type, enabled=False) if is_autocast else nullcontext():
        if backend == "reference" or (q.dtype == torch.float64 and backend is None):
            from stg_kernels.attention import reference  # loaded when it runs, as those of other ops

            return reference.branch_attention(*arguments)
        return torch.ops.stg.branch_attention(*arguments, backend)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [R, S, N, D]")
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[2:] != q.shape[2:] or x.shape != k.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be [T, K, {q.shape[2]}, {q.shape[3]}] as k and v"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}; it must be {q.dtype} on {q.device}, as q is")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; it must be 1")


def _integers(name: str, values: Iterable[SupportsIndex], stop: int) -> list[int]:
    try:
        integers = [operator.index(value) for value in values]
    except TypeError:
        integers = [-1]
    if any(not 0 <= value < stop for value in integers):
        raise ValueError(f"{name}={values} is not allowed; it must be integers from 0 to {stop - 1}")
    return integers
