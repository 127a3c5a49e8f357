"""CUDA graphs: a whole forward captured once, and launched as one in every later step with inputs of the same kind.

Nothing that a later replay writes is ever handed out, and no replay's result is used before it is known that the model
is the one that was captured. That is found out while the device works, so that a step costs the host the copies of its
inputs and one launch.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stg_engine.fused import Fusion
from stg_engine.guard import refuse_offloading
from stg_engine.memo import Memo
from stg_engine.models import ModelSpec
from stg_engine.runtime.watch import Watch, surroundings

MOST_GRAPHS = 32
"""Graphs that are kept; the one not replayed for longest goes first. A schedule has one per set of skipped layers."""

MOST_VALUES = 4096
"""Elements of a tensor that lies on the CPU beside a model that does not: a graph holds its values as constants."""

Forward = Callable[..., Any]
Replay = Callable[[], Any]


class CudaCapture:
    """Captures work of the current CUDA device, all of it into one memory pool.

    Graphs that share a pool write over each other's memory: results are to be copied before the next replay.
    """

    device_type: ClassVar[str] = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.Stream | None = None

    def begin(self) -> None:
        """What follows on the current stream runs behind the last replay, also if that was on another stream."""
        current = torch.cuda.current_stream(self.device)
        if self._last not in (None, current):
            current.wait_stream(self._last)
        self._last = current

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """`function()` on the stream of the captures, so that all it allocates, compiles and tunes once is there."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    return function()
            finally:
                current.wait_stream(self._stream)

    def capture(self, function: Callable[[], Any]) -> Replay:
        """`function` captured; each call of what is returned launches it and returns the same tensors.

        Raises what `function` raises, and `RuntimeError` for work that cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the pool cannot use what other pools hold
            with torch.cuda.stream(self._stream):
                # Other threads may allocate meanwhile, which the default mode takes for an error of this capture.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outputs = function()
                except BaseException:
                    with suppress(RuntimeError):
                        self._end(graph)
                    raise
                self._end(graph)

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except BaseException:
            # An invalid capture leaves the allocator where it was: allocating into the pool, for a graph that must live
            # as long as the filter that points to it.
            _INVALID.append(graph)
            index = torch.cuda.current_device()
            for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                with suppress(AttributeError, RuntimeError):
                    getattr(torch._C, name)(index, self._pool)
            self._pool = torch.cuda.graph_pool_handle()
            raise


_INVALID: list[torch.cuda.CUDAGraph] = []


@dataclass
class Graph:
    """A captured forward.

    inputs   the tensors that it reads, which are written before each replay
    replay   launches it; what it returns is written over by the next replay of any graph
    forward  the callable whose work it is, beside the modules that `watch` has
    fusion   what `Fusion` said of it; None where no block was to be fused
    """

    inputs: list[Tensor]
    replay: Replay
    forward: Any
    watch: Watch
    fusion: Any


class Graphs:
    """The graphs of a transformer's forwards, each for one kind of call.

    captured, replayed   how often, since `forget`
    uncaptured   plain calls since then that ran without a graph, because the modules' blocks wait for the device

    Raises `ValueError` at once where there is no CUDA device, and for a family whose forward always waits for it.
    """

    def __init__(self, transformer: nn.Module, spec: ModelSpec, fusion: Fusion, memo: Memo) -> None:
        self.transformer, self.spec, self.fusion, self.memo = transformer, spec, fusion, memo
        self.captured = self.replayed = self.uncaptured = 0
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._backend: Any = None
        self._has_warned = False
        if spec.waits_in == "forward":
            raise ValueError(f"graph=True is not allowed: {spec.family}'s forward waits for the device in every step")
        if CudaCapture.device_type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"graph=True is not allowed on {_device_of(transformer)}: there is no CUDA device here")

    def __len__(self) -> int:
        return len(self._graphs)

    def plain(self, forward: Forward, arguments: dict[str, Any]) -> Any:
        """`forward(**arguments)` as a call of its own kind, in which no block is fused."""
        return self(lambda given: forward(**given), "plain", (arguments,), forward)

    def __call__(
        self,
        function: Forward,
        kind: Hashable,
        inputs: tuple[Mapping[str, Any] | None, ...],
        forward: Forward,
        *,
        has_lengths: bool | None = None,
    ) -> Any:
        """`function(*inputs)` by a graph, captured if there is none for this kind of call; the result is new memory.

        function  calls `forward`; the same work for the same `kind` and kinds of inputs
        inputs    named tensors, numbers, strings and None, also nested in dicts, lists and tuples
        forward   the transformer, or what a hook on it wraps
        has_lengths   None where no block is fused: without a graph if the modules wait for the device. False where a
                      prompt's mask sends fused blocks back to the modules' own forward

        Raises `ValueError` on another device than CUDA, `RuntimeError` for what a graph cannot hold.
        """
        device = self._check(inputs)
        if has_lengths is None and self.spec.waits_in == "blocks":
            self.uncaptured += 1
            return function(*inputs)
        tensors: list[Tensor] = []
        key = (kind, _key(inputs, device, tensors, "inputs"), surroundings(device))
        if self._backend is None or self._backend.device != device:
            self.clear()
            self._backend = CudaCapture(device)
        self._backend.begin()
        graph = self._graphs.get(key)
        if graph is not None and graph.watch.is_in_place():
            self._graphs.move_to_end(key)
            _write(graph.inputs, tensors)
            outputs = graph.replay()
            if graph.forward == forward and graph.watch.is_unchanged():  # looked up while the device works
                if graph.fusion is not None:
                    self.fusion.resume(graph.fusion)
                self.replayed += 1
                return _copies(outputs)
        self._graphs.pop(key, None)
        graph = None  # its memory is the next one's
        refuse_offloading(self.transformer, is_below_its_hook=forward is not self.transformer)
        with torch.inference_mode(False):  # or they could not be written outside of it
            statics = [torch.empty_like(tensor) for tensor in tensors]
        _write(statics, tensors)
        call = partial(function, *_filled(inputs, device, iter(statics)))
        with self.memo.paused(), _casting_anew():
            answer = _copies(self._backend.warm_up(call))
            if has_lengths is not None:
                self._refuse_waiting(has_lengths)
            replay = self._captured(call)
        fusion = None if has_lengths is None else self.fusion.state()
        self._graphs[key] = Graph(statics, replay, forward, Watch(self.transformer), fusion)
        self._bound()
        return answer

    def forget(self) -> None:
        """The counts begin anew."""
        self.captured = self.replayed = self.uncaptured = 0

    def __str__(self) -> str:
        text = f"{self.captured} captured, {self.replayed} replays"
        if self.uncaptured:
            text += f"; {self.uncaptured} plain calls without: blocks of {self.spec.family} wait for the device"
        return text

    def clear(self) -> None:
        """Drop all graphs and the memory pool."""
        self._graphs.clear()
        self._backend = None

    def _check(self, inputs: tuple[Mapping[str, Any] | None, ...]) -> torch.device:
        """The device of the latents, if there can be graphs."""
        name = self.spec.latents[0]
        device = next(group[name].device for group in inputs if group and name in group)
        if device.type != CudaCapture.device_type:
            raise ValueError(f"graph=True is not allowed on {device}; move the model to a CUDA device")
        if torch.is_grad_enabled():
            raise RuntimeError("a CUDA graph records no gradients; call it under torch.no_grad(), or use graph=False")
        return device

    def _captured(self, call: Callable[[], Any]) -> Replay:
        try:
            replay = self._backend.capture(call)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise RuntimeError(
                f"this forward of {self.spec.family} cannot be captured as a CUDA graph ({type(error).__name__}: "
                f"{reason}); use graph=False"
            ) from error
        self.captured += 1
        return replay

    def _refuse_waiting(self, has_lengths: bool) -> None:
        if self.spec.waits_in == "blocks" and not (has_lengths and self.fusion.is_everywhere):
            why = self.fusion.used if has_lengths else "a prompt whose mask is more than padding behind it"
            raise RuntimeError(
                f"the blocks of {self.spec.family} wait for the device where they are not fused, which a CUDA graph "
                f"cannot hold (here: {why}); use graph=False"
            )

    def _bound(self) -> None:
        if len(self._graphs) <= MOST_GRAPHS:
            return
        self._graphs.popitem(last=False)
        if not self._has_warned:
            warnings.warn(
                f"more than {MOST_GRAPHS} CUDA graphs were captured: an argument that is no tensor, or a tensor on the "
                "CPU, changes from call to call; the oldest graph is dropped for each new one",
                stacklevel=5,
            )
            self._has_warned = True


def _key(value: Any, device: torch.device, tensors: list[Tensor], where: str) -> Hashable:
    """What a graph depends on of a nested value; its tensors on the device go to `tensors`, in order."""
    if isinstance(value, Tensor):
        layout = (tuple(value.shape), value.stride(), value.dtype, value.device)
        if value.device.type == device.type:
            tensors.append(value)
            return layout
        if value.numel() > MOST_VALUES:
            raise ValueError(f"{where} has {value.numel()} values on {value.device}; move it to {device}")
        return (*layout, *value.flatten().tolist())
    if isinstance(value, Mapping):
        return tuple((name, _key(item, device, tensors, f"{where}[{name!r}]")) for name, item in value.items())
    if isinstance(value, list | tuple):
        return (type(value), *(_key(item, device, tensors, f"{where}[{i}]") for i, item in enumerate(value)))
    if not isinstance(value, HASHABLE):
        raise ValueError(
            f"{where} is a {type(value).__name__}: a CUDA graph cannot tell when it changes; pass tensors, numbers and "
            "strings, or use graph=False"
        )
    return type(value), value  # 1 == 1.0 == True


HASHABLE = (bool, int, float, str, NoneType, torch.dtype, torch.device, Enum)


def _filled(value: Any, device: torch.device, statics: Iterator[Tensor]) -> Any:
    """The nested value with the next of `statics` in the place of each tensor on the device."""
    if isinstance(value, Tensor):
        return next(statics) if value.device.type == device.type else value
    if isinstance(value, Mapping):
        return {name: _filled(item, device, statics) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_filled(item, device, statics) for item in value]
        return getattr(type(value), "_make", type(value))(items)  # a named tuple takes them one by one
    return value


def _write(statics: list[Tensor], values: list[Tensor]) -> None:
    if statics:
        torch._foreach_copy_(statics, values, non_blocking=True)


@contextmanager
def _casting_anew() -> Iterator[None]:
    """Autocast casts weights in the graph: those that it keeps are gone with the user's `torch.autocast`."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _copies(outputs: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, outputs)


def _device_of(transformer: nn.Module) -> torch.device:
    return next((parameter.device for parameter in transformer.parameters()), torch.device("cpu"))
