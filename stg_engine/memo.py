"""Results that stay the same for many steps, kept while nothing that they follow from has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Memo:
    """Results of pure functions of tensors that stay the same for many steps.

    An entry is found by the tensor object (of a view: the one it views), the view's layout and the version counter, and
    holds the tensor, so that no other one can be taken for it. In-place writes raise the version and miss; writes that
    PyTorch does not count (`tensor.data`, a NumPy array that shares the memory) go unnoticed. Tensors without a version
    counter (`torch.inference_mode`) and calls that record gradients are computed anew every time.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[list[Tensor], Tensor, int]] = {}
        self._owned: set[int] = set()
        self._source: tuple[Hashable, list[Any]] = ((), [])
        self.is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, all is computed anew and nothing kept: a CUDA graph would go on reading the memory of what was."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def __len__(self) -> int:
        return len(self._entries)

    def keep_only(self, weights: Fingerprint, others: Hashable, prompt: Iterable[Tensor | None]) -> None:
        """Clear everything unless the weights, `others` and `prompt` are those of the last call.

        What is kept is bounded by one prompt, also in a loop that makes its embeddings anew in every step.
        """
        tensors = [tensor for tensor in prompt if tensor is not None and not tensor.is_inference()]
        source = (weights.state, others, *map(_identity, tensors))
        if source != self._source[0] and not self.is_paused:
            self.clear()
            # Held, because an id says nothing of an object that is gone.
            self._source = (source, [*weights.held, *map(_root, tensors)])

    def get(self, name: Hashable, inputs: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or what it returned when it was last called for `name` and these inputs."""
        if (
            self.is_paused
            or torch.is_grad_enabled()
            or torch.is_inference_mode_enabled()
            or any(tensor.is_inference() for tensor in inputs)
        ):
            return compute()
        key = (name, *map(_identity, inputs))
        entry = self._entries.get(key)
        if entry is None or entry[2] != entry[1]._version:
            result = compute()
            self._entries[key] = entry = (list(map(_root, inputs)), result, result._version)
            self._owned.add(result.untyped_storage().data_ptr())
        return entry[1]

    def owns(self, tensor: Tensor) -> bool:
        """True if the tensor views a result held here: it depends on the prompt alone."""
        return not self.is_paused and tensor.untyped_storage().data_ptr() in self._owned

    def clear(self) -> None:
        self._entries.clear()
        self._owned.clear()
        self._source = ((), [])


def _root(tensor: Tensor) -> Tensor:
    """The tensor that a view views, else itself."""
    return tensor if tensor._base is None else tensor._base


def _identity(tensor: Tensor) -> Hashable:
    layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return (id(_root(tensor)), tensor.data_ptr(), *layout, tensor._version)


@dataclass(frozen=True)
class Fingerprint:
    """What modules compute with: equal states mean equal functions, while what `held` names is alive."""

    state: Hashable
    held: list[Any]


def fingerprint(modules: Iterable[nn.Module]) -> Fingerprint:
    """Changes when a weight or buffer is written or replaced, a forward hook comes or goes, and when a PEFT adapter is
    added, switched, scaled or merged.

    Values written through `weight.data` into the same memory go unnoticed: PyTorch does not count them. Weights without
    a version counter (`torch.inference_mode`) make every fingerprint another one.
    """
    held: list[Any] = []
    states: list[Hashable] = []
    for module in (inner for outer in modules for inner in outer.modules()):
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_inference() for tensor in tensors):
            tensors = []
            held.append(object())
            states.append(id(held[-1]))
        held += [module, *tensors]
        states.append(
            (
                id(module),
                tuple((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors),
                (*module._forward_hooks, *module._forward_pre_hooks),
                tuple(getattr(module, "active_adapters", ())),
                tuple(getattr(module, "merged_adapters", ())),
                tuple(sorted(getattr(module, "scaling", {}).items())),
                getattr(module, "disable_adapters", False),
            )
        )
    return Fingerprint(tuple(states), held)
