"""The exact attention that a plain transformer runs fastest: a baseline must not be weak for want of a flag."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stg_engine.bench import timing
from stg_engine.compare import MARGIN
from stg_engine.reference import moved_block_inputs

DIFFUSERS = ("_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "xformers")
"""Exact backends that need no download; "native" is torch's SDPA by its own order."""
FIRST = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CALLS = 5
"""Calls that a candidate is timed by."""


@dataclass(frozen=True)
class Attention:
    """A diffusers backend for the processors that take one, or the kernel that torch's SDPA is to try first."""

    backend: str = "native"
    first: str | None = None

    def __str__(self) -> str:
        return f"diffusers {self.backend}" if self.first is None else f"SDPA, {self.first} first"

    @contextmanager
    def on(self, transformer: nn.Module) -> Iterator[Callable[[], Any]]:
        """While open, the transformer's processors have the backend. Yields what makes a context for each call."""
        from diffusers.models.attention_dispatch import AttentionBackendName

        processors = _processors(transformer)
        before = [processor._attention_backend for processor in processors]
        try:
            for processor in processors:
                processor._attention_backend = AttentionBackendName(self.backend)
            yield nullcontext if self.first is None else self._in_order
        finally:
            for processor, backend in zip(processors, before, strict=True):
                processor._attention_backend = backend

    def _in_order(self) -> Any:
        order = [FIRST[str(self.first)], *FIRST.values(), SDPBackend.MATH]
        return sdpa_kernel(list(dict.fromkeys(order)), set_priority=True)


def fastest(transformer: nn.Module, call: Callable[[], Tensor], device: torch.device) -> Attention:
    """The attention with which `call`, a forward of the transformer, takes least time and gives the same.

    The same: within what moving every block's input by one unit in the last place does, times `compare.MARGIN`. What
    cannot run the model's masks or dtypes is left out.
    """
    native = Attention()
    if device.type != "cuda":
        return native
    with native.on(transformer):
        expected = call()
        with moved_block_inputs(transformer):
            noise = (call().double() - expected.double()).norm()
    found: dict[Attention, float] = {}
    for attention in candidates(transformer):
        with attention.on(transformer) as context:

            def run(context: Callable[[], Any] = context) -> Tensor:
                with context():
                    return call()

            try:
                if not (run().double() - expected.double()).norm() <= MARGIN * noise:
                    continue
                samples = timing.interleaved({"": run}, device, CALLS, warmup_seconds=0)[""]
            except Exception:  # a library's own refusal, of whatever kind
                continue
            found[attention] = timing.quartiles(samples)[1]
    return min(found, key=found.__getitem__, default=native)


def candidates(transformer: nn.Module) -> list[Attention]:
    """SDPA by its own order, and in every other one; diffusers' backends that are installed, if they can be chosen."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    found = [Attention(), *(Attention(first=name) for name in FIRST)]
    for name in DIFFUSERS if _processors(transformer) else ():
        try:
            _check_attention_backend_requirements(AttentionBackendName(name))
        except (RuntimeError, ValueError):
            continue
        found.append(Attention(name))
    return found


def _processors(transformer: nn.Module) -> list[Any]:
    found = (getattr(module, "processor", None) for module in transformer.modules())
    return [processor for processor in found if hasattr(processor, "_attention_backend")]
