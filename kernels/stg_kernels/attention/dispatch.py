"""Which backend runs a part: the pinned one, the one that was measured fastest for its kind, else the first that can.

Measuring happens only inside `tuning()`, once per kind, and is kept in a file, so that no request pays for it.
"""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from timeit import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from stg_kernels.attention import reference
from stg_kernels.attention.backends import Backend, backends, spread
from stg_kernels.attention.choices import Choice, Choices, Kind, kind_of
from stg_kernels.attention.parts import Part, split

REPEATS, SAMPLED_SCORES = 20, 2**26

choices = Choices()
_ran: dict[Kind, tuple[str, str, bool]] = {}
"""The last backend, torch's pick where it has one, and whether it was pinned."""
_tuned: dict[Kind, int] | None = None
"""Inside `tuning()`: the rows of the part that a kind was measured with."""


def branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_rows: Sequence[int] | None = None,
    key_lengths: Tensor | None = None,
    value_rows: Sequence[int] | None = None,
    own_key_rows: Sequence[int] | None = None,
    text: Sequence[int] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """See `stg_kernels.branch_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = list(split(q, k, v, kv_rows, key_lengths, value_rows or (), own_key_rows or (), text, scale))
    if len(parts) == 1 and isinstance(parts[0][2], Part):
        return run(parts[0][2], backend).contiguous()
    out = q.new_empty(q.shape)
    for rows, queries, part in parts:
        out[rows, queries] = run(part, backend) if isinstance(part, Part) else part
    return out


def run(part: Part, name: str | None = None) -> Tensor:
    """A part by the pinned or chosen backend, which `used()` names from then on."""
    if part.q.numel() == 0 or part.k.numel() == 0:
        return reference.attention(part)
    kind, pinned = kind_of(part), name or os.environ.get("STG_ATTENTION")
    backend = first_pinned(part, pinned) if pinned else choose(part, kind)
    result = backend.run(part)
    if _ran.get(kind, ("", "", False))[::2] != (backend.name, bool(pinned)):
        _ran[kind] = (backend.name, _picked_by_torch(backend, part), bool(pinned))
    return result


def choose(part: Part, kind: Kind) -> Backend:
    """The backend that was measured fastest for the kind, if it is there and can run the part, else the first one."""
    choice = choices.get(kind)
    rows = part.q.shape[0]
    is_open = _tuned is not None and (choice is None or kind in _tuned) and rows > _tuned.get(kind, 0)
    if _tuned is not None and is_open and not _is_capturing(part.q):
        _tuned[kind] = rows
        if (measured := tune(part)) is not None:
            choices.put(kind, choice := measured)
    if choice is not None:
        for backend in backends():
            if backend.name == choice.backend and not backend.why_not(part):
                return backend
    return next(backend for backend in backends() if backend.is_exact and not backend.why_not(part))


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def named(pinned: str) -> list[Backend]:
    """The backends of a comma-separated list of families and members, in order; `ValueError` for an unknown name."""
    found = []
    for name in pinned.split(","):
        members = [backend for backend in backends() if name.strip() in (backend.name, backend.name.split("/")[0])]
        if not members:
            known = ", ".join(dict.fromkeys(name for b in backends() for name in (b.name.split("/")[0], b.name)))
            raise ValueError(f"attention backend {name.strip()!r} is not allowed; choose from {known}")
        found += members
    return found


def first_pinned(part: Part, pinned: str) -> Backend:
    """The first of `named` that can run the part; `RuntimeError` that says why none can."""
    found = named(pinned)
    if part.own_k is not None:  # no library has them, so that its name says nothing of such rows
        found += [backend for backend in backends() if backend.name.startswith(("triton/", "torch"))]
    reasons: dict[str, list[str]] = {}
    for backend in found:
        reason = backend.why_not(part)
        if not reason:
            return backend
        reasons.setdefault(reason, []).append(backend.name)
    why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    raise RuntimeError(
        f"attention backend {pinned!r} cannot run {kind_of(part)} ({why}); '{pinned},sdpa' would run sdpa there"
    )


@contextmanager
def tuning(*, again: bool = False) -> Iterator[None]:
    """Measure every kind of attention that runs inside and has no choice yet, and keep the choices in a file.

    The file is `$STG_ATTENTION_CACHE`, else stg_engine/attention.json in the user's cache folder. A kind is device,
    dtype, heads, head size, row features, and token counts in powers of 2; of several calls the one with the most rows
    decides. `again` measures kinds that have a choice, too. Warns if nothing ran that could be measured: no fused
    block, no step with skips, or a backend that is pinned. Not for use from several threads.
    """
    global _tuned
    before, _tuned = _tuned, {}
    if again:
        _tuned = dict.fromkeys(choices.all(), 0)
    ran = dict(_ran)
    _ran.clear()
    try:
        yield
        if all(pinned for _, _, pinned in _ran.values()):
            warnings.warn("tuning() had nothing to measure: no attention ran, or its backend is pinned", stacklevel=3)
    finally:
        _tuned = before
        _ran.update({kind: value for kind, value in ran.items() if kind not in _ran})


def tune(part: Part) -> Choice | None:
    """Time every exact backend on this part, refuse those that are less exact than the budget, keep the fastest.

    None if none is left: inputs that are not finite, or no memory, say nothing of a backend.
    """
    refused: dict[str, str] = {}
    candidates: list[Backend] = []
    sample = Sample(part)
    for backend in backends():
        if not backend.is_exact or backend.name == "torch":
            continue
        try:
            reason = backend.why_not(part) or sample.why_not(backend.run(part))
        except Exception as error:  # a library's own refusal, of whatever kind, is no reason to stop
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
        if reason:
            refused[backend.name] = reason
        else:
            candidates.append(backend)
    if len(candidates) < 2:
        return Choice(candidates[0].name, {}, refused) if candidates else None
    seconds = {backend.name: measure(partial(backend.run, part), part.q.device) for backend in candidates}
    return Choice(min(seconds, key=seconds.__getitem__), seconds, refused)


class Sample:
    """Some queries of every row and head, in float64, and how exact plain torch is there in the part's dtype."""

    def __init__(self, part: Part) -> None:
        rows, queries, heads, _ = part.q.shape
        count = max(1, min(queries, SAMPLED_SCORES // (rows * heads * part.k.shape[1])))
        self.at = torch.linspace(0, queries - 1, count, device=part.q.device).long()
        part = replace(part, q=part.q[:, self.at])
        if part.own_k is not None and part.own_v is not None:
            part = replace(part, own_k=part.own_k[:, self.at], own_v=part.own_v[:, self.at])
        wide = {name: x.double() for name, x in vars(part).items() if isinstance(x, Tensor) and x.is_floating_point()}
        self.exact = reference.attention(replace(part, **wide))
        plain = (reference.attention(part, low_precision=True).double() - self.exact).abs().max()
        rounding = torch.finfo(part.q.dtype).eps / 2 * self.exact.abs().max()
        self.budget = 2 * (plain + rounding).item()

    def error(self, result: Tensor) -> float:
        return (result[:, self.at].double() - self.exact).abs().max().item()

    def why_not(self, result: Tensor) -> str:
        error = self.error(result)
        return "" if error <= self.budget else f"error {error:.2e}, allowed {self.budget:.2e}"


def measure(call: Any, device: torch.device) -> float:
    """Median seconds of a call, on a device that is warm."""
    call()
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=25, rep=100, return_mode="median") / 1e3
    return statistics.median(repeat(call, number=1, repeat=REPEATS))


def state() -> tuple[bool, int]:
    """Changes when another backend may run, or one is to be measured: a captured CUDA graph runs what it ran then."""
    return _tuned is not None, choices.changes


def used() -> dict[str, str]:
    """Per kind of attention that ran since `forget_used`, the last backend and why: pinned, measured, or neither."""
    ran = dict(_ran)  # another thread may add to it
    measured = {(kind, choice.backend) for kind, choice in choices.all().items() if choice.seconds}
    why = {kind: "pinned" if pin else "measured" if (kind, n) in measured else "" for kind, (n, _, pin) in ran.items()}
    return {str(kind): f"{name}{pick}{', ' * bool(why[kind])}{why[kind]}" for kind, (name, pick, _) in ran.items()}


def ran(part: Part) -> str:
    """The backend that ran last for parts of this kind, with torch's own pick."""
    return "".join(_ran[kind_of(part)][:2])


def forget_used() -> None:
    """`used()` begins anew."""
    _ran.clear()


def _picked_by_torch(backend: Backend, part: Part) -> str:
    """SDPA's own pick, where it picks: " (flash)"."""
    if backend.name != "sdpa" or not part.q.is_cuda or part.key_lengths is not None:
        return ""
    picked = torch._fused_sdp_choice(*(x.transpose(1, 2) for x in spread(part)), scale=part.scale)
    return f" ({SDPBackend(picked).name.removesuffix('_ATTENTION').lower()})"
