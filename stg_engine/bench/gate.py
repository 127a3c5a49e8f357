"""Whether a variant's result is equal to what is exact, as far as plain passes in its dtype are."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stg_engine.bench.case import Step
from stg_engine.bench.passes import Exact
from stg_engine.compare import MARGIN


class GateFailure(RuntimeError):
    """A result that is further from what is exact than twice the plain passes'."""


class Errors(NamedTuple):
    """Of a guided prediction, what it may be, and of the guidance delta c - p."""

    guided: float
    budget: float
    delta: float


@dataclass(frozen=True)
class Gate:
    """What is exact, and how far from it a result may be: MARGIN times as far as plain passes one by one in this dtype.

    guided   allowed errors, of every output; `delta` that of c - p
    latents  of the case's inputs: a result that is kept, or a graph that does not read them, is right for these alone
    other    what plain passes predict when they have the other sign
    """

    exact: Exact
    guided: tuple[float, ...]
    delta: float
    latents: Sequence[Tensor] = ()
    other: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, exact: Exact, plain: Step, latents: Sequence[Tensor] = ()) -> Gate:
        """`RuntimeError` if plain passes are not finite or a skip changes nothing, so that nothing could be judged."""
        guided, delta = errors(exact, plain)
        limits = [MARGIN * error for error in (*guided, delta)]
        if not all(0 < limit < math.inf for limit in limits):
            raise RuntimeError(f"plain passes give no budget: {limits}; is a prediction not finite, or c equal to p?")
        with _negated(latents):
            return cls(exact, tuple(limits[:-1]), limits[-1], latents, _outputs(plain) if latents else ())

    def check(self, step: Step, *, is_exact: bool = True) -> Errors:
        """The errors, of the output that comes nearest to its budget.

        `GateFailure` if one is above it, for a lossy variant if it is not finite; for both if the prediction does not
        follow the latents, or has another dtype than plain passes'.
        """
        guided, delta = errors(self.exact, step)
        name, error, budget = max(
            ((f"output {i}", *pair) for i, pair in enumerate(zip(guided, self.guided, strict=True))),
            key=lambda of: of[1] / of[2],
        )
        for what, value, limit in ((name, error, budget), ("c - p", delta, self.delta)):
            if not value <= (limit if is_exact else sys.float_info.max):
                raise GateFailure(f"error of {what} {value:.2e}, allowed {limit:.2e}")
        if self.latents:
            self._check_other(step)
        return Errors(error, budget, delta)

    def _check_other(self, step: Step) -> None:
        with _negated(self.latents):
            outputs = _outputs(step)
        for i, (found, first, other) in enumerate(zip(outputs, self.exact.guided, self.other, strict=True)):
            if found.dtype != other.dtype:
                raise GateFailure(f"output {i} is {found.dtype}, that of plain passes {other.dtype}")
            if not distance(found, other) <= distance(first, other) / 2:
                raise GateFailure(f"output {i} does not follow the latents")


@contextmanager
def _negated(latents: Sequence[Tensor]) -> Iterator[None]:
    """While open, these have the other sign, in the same memory."""
    try:
        for tensor in latents:
            tensor.neg_()
        yield
    finally:
        for tensor in latents:
            tensor.neg_()


def _outputs(step: Step) -> tuple[Tensor, ...]:
    guided = step.guided()
    return guided if isinstance(guided, tuple) else (guided,)


def errors(exact: Exact, step: Step) -> tuple[tuple[float, ...], float]:
    """`|x - exact| / |exact|`, L2, of every guided output and of the first one's guidance delta; inf if not finite."""
    guided = _outputs(step)
    of_delta = distance(delta(step.branches()), delta(exact.branches))
    return tuple(distance(a, b) for a, b in zip(guided, exact.guided, strict=True)), of_delta


def delta(branches: dict[str, Tensor]) -> Tensor:
    """c - p of every weak pass, [..., B, ...]; of CFG alone c - u."""
    wide = {name: branch.double() for name, branch in branches.items()}
    weak = [name for name in wide if name not in ("cond", "uncond")] or ["uncond"]
    return torch.stack([wide["cond"] - wide[name] for name in weak])


def distance(a: Tensor, b: Tensor) -> float:
    """`|a - b| / |b|`, L2; infinite if that is no number, or if the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    found = float((a.double() - b.double()).norm() / b.double().norm())
    return found if found == found else math.inf
