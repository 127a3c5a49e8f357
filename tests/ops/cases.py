"""Ugly inputs for every op, and the error budget that is measured on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Inputs:
    """Random tensors of one case; `strided` makes views into larger tensors that begin at odd offsets."""

    def __init__(self, dtype: torch.dtype, *, seed: int = 0, strided: bool = False) -> None:
        self.dtype, self.strided = dtype, strided
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if not self.strided:
            return self._randn(shape, dtype)
        padded = (*(size + 1 for size in shape[:-1]), shape[-1] + 3)
        view = self._randn(padded, dtype)
        return view[tuple(slice(1, None) for _ in shape[:-1])][..., 2:-1]

    def _randn(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=DEVICE).to(dtype or self.dtype)


def all_residual_arguments(new: Inputs) -> dict[str, Tensor]:
    """Every tensor that `residual_gate_norm_modulate` takes; gate per token, scale and shift per row."""
    x, y, tables = new.normal(3, 4, 24), new.normal(3, 4, 24), new.normal(2, 2, 1, 24)
    return {
        "x": x,
        "y": y,
        "gate": new.normal(2, 4, 24),
        "scale": tables[0],
        "shift": tables[1],
        "weight": new.normal(24),
        "bias": new.normal(24),
        "row_map": torch.tensor([1, 0, 1], device=DEVICE),
        "pass_through": torch.tensor([False, True, False], device=DEVICE),
    }


def far_uncond(new: Inputs, magnitude: float, size: tuple[int, ...]) -> dict[str, Tensor]:
    """Rows and scales of two videos whose uncond knows nothing of cond and is `magnitude` times as large."""
    cond = new.normal(2, *size)
    rows = torch.cat([magnitude * new.normal(2, *size), cond, cond + 0.1 * new.normal(2, *size)])
    return {"rows": rows, "scales": torch.tensor([5.0, 0.7, 1.0], device=DEVICE)}


def widened(value):
    """The same numbers in float64."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_within_budget(actual, low_precision, exact) -> None:
    """`actual` is at most twice as far from `exact` as `low_precision`, plain torch in the same dtype, may be.

    That is its error on these inputs and half a unit in the last place, for where it happens to round well.
    """
    if isinstance(actual, tuple):
        for parts in zip(actual, low_precision, exact, strict=True):
            assert_within_budget(*parts)
        return
    assert actual.shape == exact.shape
    assert actual.isfinite().all() == exact.isfinite().all()
    budget = (low_precision.double() - exact).abs().max()
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= 2 * (budget + rounding), f"error {error:.2e}, budget {budget:.2e}, rounding {rounding:.2e}"
