"""Whether a module still computes what it computed: the same modules, memory, hooks, processors, adapters, settings."""

from __future__ import annotations

import operator
import os
import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

CONTAINERS = (dict, OrderedDict, list, set)
"""Attributes of these types are changed in place, so that they are compared with a copy."""


class Watch:
    """A module and all below it as they are now, to be compared with later.

    What is compared are the attributes of every module, one level into containers, and those of its attention processor
    and of its diffusers hooks. Values written in place into the same memory are not seen, and need not be: whoever
    reads that memory reads them. Everything is held, so that its memory is not given to anything else.
    """

    def __init__(self, root: nn.Module) -> None:
        self._states = [state for module in root.modules() for state in _states(module)]
        self._then = [_copy(state) for state in self._states]
        self._stores = [store for module in root.modules() for store in (module._parameters, module._buffers)]
        self._tensors = [tensor for store in self._stores for tensor in store.values()]
        attributes = (value for then in self._then for value in then.values())
        of_modules = (value for value in attributes if isinstance(value, Tensor))
        self._memory = [
            plain for value in (*self._tensors, *of_modules) if value is not None for plain in _plain(value)
        ]
        self._addresses, self._layouts = self._where(), self._how()

    def is_in_place(self) -> bool:
        """True if every tensor has the address that it had; false behind an offloading or `module.to(...)`."""
        return self._where() == self._addresses

    def is_unchanged(self) -> bool:
        """True if every module has the attributes, parameters, buffers, hooks and processors that it had.

        A tensor with another layout in the same memory is another one.
        """
        now = [tensor for store in self._stores for tensor in store.values()]
        if len(now) != len(self._tensors) or not all(map(operator.is_, now, self._tensors)):
            return False
        if self._how() != self._layouts:
            return False
        try:
            return all(map(operator.eq, self._states, self._then))
        except Exception:  # of another tensor or array in a tensor's place: they compare by element
            return False

    def _where(self) -> list[int]:
        return [*map(Tensor.data_ptr, self._memory)]

    def _how(self) -> list[Hashable]:
        return [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in self._memory]


def surroundings(device: torch.device) -> Hashable:
    """What a forward's work on a device follows from beside its modules and inputs: settings of the process."""
    cuda, kind = torch.backends.cuda, device.type
    dispatch = sys.modules.get("stg_kernels.attention.dispatch")
    return (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        (cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision),  # older names of them raise
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_accumulation,
        torch.are_deterministic_algorithms_enabled(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        (*torch._C._get_sdp_priority_order(),),
        _AttentionBackendRegistry.get_active_backend()[0],
        torch.nn.functional.scaled_dot_product_attention,  # attention libraries put their own in its place
        os.environ.get("STG_ATTENTION"),
        (False, 0) if dispatch is None else dispatch.state(),
        (*torch_module._global_forward_hooks, *torch_module._global_forward_pre_hooks),
    )


def _states(module: nn.Module) -> Iterator[dict[str, Any]]:
    attributes = vars(module)
    yield attributes
    for name in ("processor", "_diffusers_hook"):
        value = attributes.get(name)
        if hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            yield vars(value)


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if type(value) in CONTAINERS else value for name, value in state.items()}


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself, or those that one of a wrapping type (quantised weights) is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))
