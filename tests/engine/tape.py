"""A stand-in for CUDA graphs on the CPU: it repeats recorded operations on the memory that they had, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}
"""Operations for which a CUDA device is waited for: a capture refuses them."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Records operations; `repeat` runs them on the memory that they had, Python code around them left out.

    Like a graph's, its memory holds nothing that lasts: it is filled with NaN when it is not running.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict[str, Any], Any]] = []
        self.owned: dict[int, Tensor] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        masks = operation in INDEXED and any(t.dtype == torch.bool for t in tensors_of(args[1]))
        # A list made a tensor is copied from the host; a single number is filled in.
        copied = operation is aten.lift_fresh.default and args[0].ndim > 0
        if operation in WAITS or masks or copied:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({operation})")
        result = operation(*args, **kwargs)
        given = {_memory(tensor) for tensor in tensors_of((args, kwargs))}
        for tensor in tensors_of(result):
            if _memory(tensor) not in given:
                self.owned.setdefault(_memory(tensor), tensor)
        self.operations.append((operation, args, kwargs, result))
        return result

    @torch.inference_mode()  # where tensors made in it may be written
    def repeat(self) -> None:
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            for before, now in zip(tensors_of(result), tensors_of(again), strict=True):
                if _memory(before) != _memory(now):
                    before.copy_(now)

    @torch.inference_mode()
    def poison(self) -> None:
        for tensor in self.owned.values():
            if tensor.is_floating_point() and tensor.numel():
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                whole.fill_(torch.nan)


class TapeCapture:
    """In the place of `stg_engine.runtime.graphs.CudaCapture`: all its tapes share one memory, as a pool does."""

    device_type: ClassVar[str] = "cpu"
    made: ClassVar[list[TapeCapture]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tapes: list[Tape] = []
        self.warm_ups = self.replays = 0
        self.made.append(self)

    def begin(self) -> None:
        pass

    def warm_up(self, function: Callable[[], Any]) -> Any:
        self.warm_ups += 1
        return function()

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        tape = Tape()
        with tape:
            outputs = function()
        self.tapes.append(tape)
        tape.poison()

        def replay() -> Any:
            self.replays += 1
            for other in self.tapes:
                other.poison()
            tape.repeat()
            return outputs

        return replay
