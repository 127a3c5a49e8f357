"""A case that takes milliseconds, and ceilings that nothing was measured for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.tiny import tiny_inputs, tiny_transformer
from stg_kernels.attention import dispatch
from stg_kernels.attention.backends import LIBRARIES, TORCH

from stg_engine.bench import cases, ceilings, timing
from stg_engine.bench.case import Case
from stg_engine.bench.cost import Ceilings
from stg_engine.config import STGConfig


def tiny_case(name: str = "tiny", guidance_scale: float | None = 3.0, **config: Any) -> Case:
    """4 blocks of 32 channels on 24 tokens, layer 2 skipped."""

    def inputs(device: torch.device, dtype: torch.dtype) -> Any:
        shared, cond, uncond = tiny_inputs(dtype=dtype)
        return shared, cond, None if guidance_scale is None else uncond

    return Case(
        name=name,
        title="LTX-Video of 4 blocks",
        kind="cpu",
        tokens=24,
        config=STGConfig(**{"layers": (2,), **config}),
        guidance_scale=guidance_scale,
        build=lambda: tiny_transformer(dtype=torch.get_default_dtype()),
        inputs=inputs,
    )


def install(monkeypatch: pytest.MonkeyPatch, *others: Case) -> Case:
    """The only cases that there are; warm-up and ceilings take no time."""
    case = tiny_case()
    monkeypatch.setattr(cases, "CASES", {c.name: c for c in (case, *others)})
    monkeypatch.setattr(timing, "WARMUP_SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "measure", lambda *_: Ceilings(1e11, 5e10, 1e10))
    monkeypatch.delenv("STG_ATTENTION", raising=False)
    # Triton's interpreter is not what a CPU would be tuned with.
    monkeypatch.setattr(dispatch, "backends", lambda: (*LIBRARIES, TORCH))
    return case
