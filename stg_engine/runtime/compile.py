"""Regional `torch.compile`: every block of a class runs the same compiled code, whatever its rows.

Compiled is the forward of the block's class with the block as an argument: weights are inputs of the graph, so that 28
blocks cost what one costs. The number of rows is dynamic. PyTorch specialises sizes 0 and 1, so there are two graphs
per class: one for a single row, one for two and more. Streams and arguments come in one layout, for which see `_alike`:
another would be another graph.

The hooks of this package inside a block are off while compiled code runs, hence only blocks in which the plan changes
nothing inside are compiled, and prompt keys and values are computed anew in every step.
"""

from __future__ import annotations

import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported, UserError

from stg_engine.hooks import Forward, has_global_hooks, hook_of, is_plain, runs_own_forward, signature_of

MODES = ("default", "max-autotune-no-cudagraphs")
BACKEND = "inductor"

Key = tuple[type[nn.Module], tuple[tuple[str, tuple[int, ...]], ...]]
"""Class, names and shapes of the weights: one compiled function serves all blocks that have them."""


def check_mode(mode: str | None) -> None:
    """`ValueError` unless it is None or one of `MODES`."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"compile={mode!r} is not allowed; choose None or one of {', '.join(map(repr, MODES))}")


class Compiler:
    """Runs blocks by compiled code, or as the modules that they are.

    spec    the family's `ModelSpec`
    blocks  the transformer's
    mode    one of `MODES`, as `torch.compile` has it

    What is compiled stays for the process, as with `torch.compile` itself, and serves every `Denoiser` with blocks of
    that class and these weights' shapes. A change of what Dynamo guards (weights' dtype, adapters and their scales,
    processors, attributes) compiles anew; hooks inside a block are looked for before every call.
    """

    def __init__(self, spec: Any, blocks: Sequence[nn.Module], mode: str) -> None:
        self.mode = mode
        self._carriers = (*spec.streams, *spec.block_rows)
        self._keys = {id(block): _key(block) for block in blocks}
        self._refused: dict[Key, str] = {}
        self._ran: dict[int, str] = {}

    @property
    def used(self) -> str:
        """How each block ran last, in words."""
        if not self._ran:
            return "none yet"
        ways = Counter(self._ran.values())
        compiled = f"torch.compile ({self.mode}) in {ways.pop('', 0)} of {len(self._keys)} blocks"
        return "; ".join([compiled, *(f"{count} as they are: {why}" for why, count in ways.items())])

    def forward(self, block: nn.Module, forward: Forward, why_not: str = "") -> Forward:
        """`forward`, the block's own, or where nothing speaks against it the compiled one."""
        key = self._keys[id(block)]
        self._ran[id(block)] = why_not = why_not or self._refused.get(key) or _unsuited(block)
        return forward if why_not else partial(self._run, block, forward)

    def _run(self, block: nn.Module, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        key = self._keys[id(block)]
        arguments = {**dict(zip(list(signature_of(type(block)).parameters)[1:], args, strict=False)), **kwargs}
        alike = {name: _alike(value) if name in self._carriers else value for name, value in arguments.items()}
        try:
            with _without_own_hooks(block):
                return _compiled(key, self.mode, BACKEND)(block, **alike)
        except (Unsupported, UserError, FailOnRecompileLimitHit) as error:  # nothing of it has run
            self._ran[id(block)] = self._refused[key] = _in_words(error)
            warnings.warn(f"blocks of class {type(block).__name__} run as they are: {_in_words(error)}", stacklevel=2)
        return forward(**arguments)


def _key(block: nn.Module) -> Key:
    return type(block), tuple((name, tuple(weight.shape)) for name, weight in block.named_parameters())


@cache
def _compiled(key: Key, mode: str, backend: str) -> Callable[..., Any]:
    """The class's forward, compiled. As a function of its own, whose graphs are not those of the user's `compile()`."""
    forward: Any = key[0].forward
    own = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    options = {"mode": mode} if backend == "inductor" else {}
    return torch.compile(own, backend=backend, fullgraph=True, **options)


def _unsuited(block: nn.Module) -> str:
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if has_global_hooks():
        return "forward hooks on all modules"
    if not runs_own_forward(block) or not all(is_plain(module) for module in block.modules() if module is not block):
        return "hooks inside"
    return ""


def _alike(value: Any) -> Any:
    """The tensor, or tuple of tensors, as the graph wants it: any number of rows, contiguous, no view.

    A new object, because the mark that dim 0 is dynamic stays on it; strides are contiguous where a size is 1, too.
    """
    if isinstance(value, tuple):
        return tuple(map(_alike, value))
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    value = value.contiguous().view(-1).view(value.shape).detach()
    if value.storage_offset():  # guarded whether it is 0
        with torch.cuda.device_of(value):  # of another device it is refused
            value = torch.from_dlpack(value)
    maybe_mark_dynamic(value, 0)
    return value


@contextmanager
def _without_own_hooks(block: nn.Module) -> Iterator[None]:
    """The modules inside run their own forwards: Dynamo would trace the hooks, which read the guided forward."""
    hooked = [(vars(module), hook_of(module)) for module in block.modules() if module is not block]
    forwards = [(attributes, attributes.pop("forward")) for attributes, hook in hooked if hook is not None]
    try:
        yield
    finally:
        for attributes, forward in forwards:
            attributes["forward"] = forward


def _in_words(error: Exception) -> str:
    if isinstance(error, FailOnRecompileLimitHit):
        return "more variants than torch._dynamo.config.recompile_limit allows (TORCH_LOGS=recompiles says why)"
    return f"torch.compile cannot trace it ({str(error).strip().splitlines()[0]})"
