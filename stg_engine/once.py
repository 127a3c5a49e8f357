"""Modules that need to run once: per step where all branches agree, per prompt where nothing else goes in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from stg_engine.rows import Slot, chunk_ranges, narrow


class Memo:
    """Results of pure functions of tensors that stay the same for many steps.

    An entry is found by the memory that a tensor views and its version counter, and holds the tensor, so that the
    memory cannot be given to another one. In-place writes raise the version and miss. Tensors without a version
    counter (`torch.inference_mode`) and calls that record gradients are computed anew every time.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[tuple[Tensor, ...], Any, tuple[int, ...]]] = {}
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
    """Changes when a weight is written or replaced, or when a PEFT adapter is added, switched, scaled or merged."""
    return tuple(
        (
            id(module),
            tuple((id(weight), weight._version) for weight in module.parameters() if not weight.is_inference()),
            tuple(getattr(module, "active_adapters", ())),
            tuple(getattr(module, "merged_adapters", ())),
            tuple(sorted(getattr(module, "scaling", {}).items())),
            getattr(module, "disable_adapters", False),
        )
        for module in modules
    )


class OncePerPrompt(ModelHook):
    """Keeps the result for an input that depends on the prompt alone."""

    def __init__(self, slot: Slot, memo: Memo) -> None:
        super().__init__()
        self.slot, self.memo = slot, memo

    def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        forward, run = self.fn_ref.original_forward, self.slot.run
        if run is None:
            return forward(x)
        if not self.memo.owns(x):
            return in_chunks(forward, x, run.max_rows)
        return self.memo.get(id(self), (x,), lambda: in_chunks(forward, x, run.max_rows))


class OncePerStep(ModelHook):
    """Runs on one branch's rows, the first B of K * B; all branches get the result.

    `rows` are positions, not names: a PEFT layer in the module's place has other argument names.
    """

    def __init__(self, slot: Slot, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.slot, self.rows = slot, rows

    def new_forward(self, module: nn.Module, *args: Any) -> Any:
        forward, run = self.fn_ref.original_forward, self.slot.run
        if run is None:
            return forward(*args)
        parts = [
            forward(*(narrow(arg, start, stop) if i in self.rows else arg for i, arg in enumerate(args)))
            for start, stop in chunk_ranges(run.videos, run.max_rows)
        ]
        if isinstance(parts[0], tuple):
            return tuple(_repeat(torch.cat(items), len(run.names)) for items in zip(*parts, strict=True))
        return _repeat(torch.cat(parts), len(run.names))


class TimeEmbedding(ModelHook):
    """Maps the timesteps of one branch, each distinct value once; all branches get the result.

    Values are sought only where tokens have timesteps of their own: it waits for the device once per step. With
    `max_rows` every row keeps its full list of timesteps, so that its result is bitwise that of a pass run alone.
    """

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    def new_forward(self, module: nn.Module, timestep: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        forward, run = self.fn_ref.original_forward, self.slot.run
        if run is None:
            return forward(timestep, *args, **kwargs)
        branches = len(run.names)
        timestep = timestep[: timestep.numel() // branches]
        per_video = timestep.numel() // run.videos
        if run.max_rows is None and per_video > 1:
            values, inverse = timestep.unique(return_inverse=True)
            results = tuple(result[inverse] for result in forward(values, *args, **kwargs))
        else:
            size = None if run.max_rows is None else run.max_rows * per_video
            parts = [forward(timestep[a:b], *args, **kwargs) for a, b in chunk_ranges(timestep.numel(), size)]
            results = tuple(map(torch.cat, zip(*parts, strict=True)))
        return tuple(result.repeat(branches, *[1] * (result.ndim - 1)) for result in results)


class PerRow(ModelHook):
    """Runs a module of one argument at most `max_rows` rows at a time."""

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        forward, run = self.fn_ref.original_forward, self.slot.run
        return forward(x) if run is None else in_chunks(forward, x, run.max_rows)


def in_chunks(forward: Callable[[Tensor], Tensor], x: Tensor, max_rows: int | None) -> Tensor:
    """`forward(x)`, at most `max_rows` rows of dim 0 at a time."""
    parts = [forward(x[start:stop]) for start, stop in chunk_ranges(x.shape[0], max_rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _repeat(rows: Tensor, branches: int) -> Tensor:
    if rows.shape[0] == 1:
        return rows.expand(branches, *rows.shape[1:])
    return rows.repeat(branches, *[1] * (rows.ndim - 1))
