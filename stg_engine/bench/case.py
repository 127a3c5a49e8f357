"""A model, its inputs and its guidance, to be measured; and a way to compute its guided step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.config import STGConfig
from stg_engine.plan import Plan

Inputs = Mapping[str, Any]
KINDS = ("true", "small", "cpu")


@dataclass(frozen=True, eq=False)
class Case:
    """A transformer of a published architecture with random weights, and the inputs of one guided step of one video.

    name       such as "ltx-video-2b", "ltx-video-2b-small", "ltx-video-2b-cpu"
    title      model, and resolution x frames
    kind       "true": published architecture and token count; "small": the same weights, so few tokens that launches
               dominate; "cpu": fewer and narrower blocks, for machines without a GPU
    tokens     video tokens in self-attention, of one row
    config     the published guidance: its layers (in a "cpu" case at the same relative depth), mode, scale
    guidance_scale  g, or None: no CFG
    build      () -> the transformer, in eval mode, no gradients; under the caller's `torch.device` and default dtype
    inputs     (device, dtype) -> (shared, cond, uncond or None) as `Denoiser` takes them; the same in every call
    """

    name: str
    title: str
    kind: str
    tokens: int
    config: STGConfig
    guidance_scale: float | None
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.device, torch.dtype], tuple[Inputs, Inputs, Inputs | None]]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Step:
    """One way to compute a case's guided step, ready to be called again and again.

    guided     () -> the guided prediction [B, ...], or a tuple of them (LTX-2)
    branches   () -> {"cond": [B, ...], "uncond": ..., "skip": ...} of the first output, for the parity gate
    plan       rows per block that it computes; None for plain passes of a whole forward
    describe   () -> (what the blocks ran, what attention ran), asked after a call
    """

    guided: Callable[[], Tensor | tuple[Tensor, ...]]
    branches: Callable[[], dict[str, Tensor]]
    plan: Plan | None
    describe: Callable[[], tuple[str, str]]


@dataclass(frozen=True)
class Variant:
    """A way to compute guided steps that a user could choose: a baseline, or the engine with one technique more.

    name        such as "batched-passes", "engine"; `title` in words
    is_exact    the same function in real arithmetic
    why_not     (case, device) -> why it cannot run there, or ""
    prepare     (case, transformer, inputs) -> context in which its `Step` can be called; the transformer is its own
                module on shared weights and is left as it was
    """

    name: str
    title: str
    is_exact: bool
    why_not: Callable[[Case, torch.device], str]
    prepare: Callable[[Case, nn.Module, tuple[Inputs, Inputs, Inputs | None]], AbstractContextManager[Step]]
