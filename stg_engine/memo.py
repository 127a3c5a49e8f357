"""Results that stay the same for many steps, kept while nothing that they follow from has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn


class Memo:
    """Results of pure functions of tensors that stay the same for many steps.

    An entry is found by the memory that a tensor views and its version counter, and holds the tensor, so that the
    memory cannot be given to another one. In-place writes raise the version and miss. Tensors without a version
    counter (`torch.inference_mode`) and calls that record gradients are computed anew every time.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[tuple[Tensor, ...], Tensor, int]] = {}
        self._owned: set[int] = set()
        self._source: Hashable = None

    def __len__(self) -> int:
        return len(self._entries)

    def keep_only(self, source: Hashable, prompt: Iterable[Tensor | None]) -> None:
        """Clear everything unless `source` (a fingerprint of the weights) and `prompt` are those of the last call.

        What is kept is bounded by one prompt, also in a loop that makes its embeddings anew in every step.
        """
        tensors = [tensor for tensor in prompt if tensor is not None and not tensor.is_inference()]
        source = (source, *map(_view_of_memory, tensors))
        if source != self._source:
            self.clear()
            self._source = source

    def get(self, name: Hashable, inputs: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or what it returned when it was last called for `name` and these inputs."""
        if (
            torch.is_grad_enabled()
            or torch.is_inference_mode_enabled()
            or any(tensor.is_inference() for tensor in inputs)
        ):
            return compute()
        key = (name, *map(_view_of_memory, inputs))
        entry = self._entries.get(key)
        if entry is None or entry[2] != entry[1]._version:
            result = compute()
            self._entries[key] = entry = (inputs, result, result._version)
            self._owned.add(result.untyped_storage().data_ptr())
        return entry[1]

    def owns(self, tensor: Tensor) -> bool:
        """True if the tensor views a result held here: it depends on the prompt alone."""
        return tensor.untyped_storage().data_ptr() in self._owned

    def clear(self) -> None:
        self._entries.clear()
        self._owned.clear()
        self._source = None


def _view_of_memory(tensor: Tensor) -> Hashable:
    storage = tensor.untyped_storage().data_ptr()
    layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return (storage, *layout, tensor._version)


def weights_fingerprint(modules: Iterable[nn.Module]) -> Hashable:
    """Changes when a weight is written or replaced, or when a PEFT adapter is added, switched, scaled or merged.

    Values written through `weight.data` into the same memory go unnoticed: PyTorch does not count them.
    """
    return tuple(
        (
            id(module),
            tuple(
                (id(weight), weight.data_ptr(), weight._version)
                for weight in module.parameters()
                if not weight.is_inference()
            ),
            tuple(getattr(module, "active_adapters", ())),
            tuple(getattr(module, "merged_adapters", ())),
            tuple(sorted(getattr(module, "scaling", {}).items())),
            getattr(module, "disable_adapters", False),
        )
        for module in modules
    )
