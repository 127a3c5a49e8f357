"""Block forwards built from `stg_kernels`, one file per family: the same function as the module's own forward."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.hooks import has_global_hooks


class Fusion:
    """Chooses between a block's fused forward and the module's own.

    family   module of this package with `supports(transformer, block, dtype of the latents)` and
             `forward(run, index, block, ...)`, or None
    kernels  "auto" or "off"
    is_compiled   blocks run compiled, so none is fused; the guidance may be
    used     what the last choice was, in words; `is_on` is True if it was the fused forward in any block,
             `is_everywhere` if in all
    has_masks   set to True where a prompt's mask is more than padding behind it, and attention is diffusers'

    Raises `ValueError` if `$STG_ATTENTION` names no backend.
    """

    def __init__(self, family: str | None, kernels: str, *, is_compiled: bool = False) -> None:
        self.used, self.is_on, self.is_everywhere, self.has_masks = "none yet", False, False, False
        self._resumed: tuple[str, ...] = ()
        self._why_not, self._is_compiled = "", is_compiled
        if kernels == "off":
            self._why_not = "kernels='off'"
        elif family is None:
            self._why_not = "no fused form of this family"
        elif find_spec("stg_kernels") is None:
            self._why_not = "stg_kernels is not installed"
        if not self._why_not and (pinned := os.environ.get("STG_ATTENTION")):
            import_module("stg_kernels.attention.dispatch").named(pinned)  # a ValueError before anything runs
        self._family = None if self._why_not else import_module(f"stg_engine.fused.{family}")
        self.forget_attention()

    @property
    def is_possible(self) -> bool:
        """False if no block will ever be fused."""
        return self._family is not None and not self._is_compiled

    def attention(self) -> tuple[str, ...]:
        """Per kind of attention, the backend that fused blocks ran since `forget_attention`, in this process."""
        dispatch = sys.modules.get("stg_kernels.attention.dispatch")
        lines = [] if dispatch is None else [f"{kind}: {backend}" for kind, backend in dispatch.used().items()]
        if self.has_masks:
            lines.append("a prompt whose mask is more than padding behind it: diffusers")
        return tuple(dict.fromkeys((*lines, *self._resumed)))

    def forget_attention(self) -> None:
        """`attention()` begins anew."""
        self.has_masks, self._resumed = False, ()
        dispatch = sys.modules.get("stg_kernels.attention.dispatch")
        if dispatch is not None:
            dispatch.forget_used()

    def forwards(self, transformer: nn.Module, blocks: Sequence[nn.Module], latents: Tensor) -> list[Any]:
        """Per block its fused forward, or None for the module's own."""
        why_not = self._why_not or _unsuited(latents)
        if why_not or self._family is None:
            self.used, self.is_on, self.is_everywhere = f"modules as they are: {why_not}", False, False
            return [None] * len(blocks)
        language = "Triton" if latents.device.type == "cuda" else "C++"
        if self._is_compiled:
            self.used = f"stg_kernels ({language}) in the guidance alone: compile is set"
            self.is_on, self.is_everywhere = True, False
            return [None] * len(blocks)
        family, dtype = self._family, latents.dtype
        forwards = [family.forward if family.supports(transformer, block, dtype) else None for block in blocks]
        count = sum(forward is not None for forward in forwards)
        others = ", the others have hooks, processors or modules that the kernels do not cover"
        rest = "" if count == len(blocks) else others
        part = "the attention of " if getattr(family, "ATTENTION_ALONE", False) else ""
        self.used = f"stg_kernels ({language}) in {part}{count} of {len(blocks)} blocks{rest}"
        self.is_on, self.is_everywhere = count > 0, count == len(blocks)
        return forwards

    def state(self) -> tuple[str, bool, bool, tuple[str, ...]]:
        """What the last choice was and what attention ran, for `resume`."""
        return self.used, self.is_on, self.is_everywhere, self.attention()

    def resume(self, state: tuple[str, bool, bool, tuple[str, ...]]) -> None:
        """The same forward ran again, without a choice: it is in a CUDA graph."""
        self.used, self.is_on, self.is_everywhere, attention = state
        self._resumed = tuple(dict.fromkeys((*self._resumed, *attention)))


def _unsuited(latents: Tensor) -> str:
    import stg_kernels

    if torch.is_grad_enabled():
        return "gradients are recorded"
    if torch.is_autocast_enabled(latents.device.type):
        return "autocast is on"
    if has_global_hooks():
        return "forward hooks on all modules"
    if latents.dtype not in stg_kernels.DTYPES:
        return f"{latents.dtype} has no kernels"
    if not stg_kernels.accelerates(latents.device):
        return f"this installation has no kernels for {latents.device.type} (README, On your pipeline)"
    return ""
