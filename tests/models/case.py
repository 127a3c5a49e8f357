"""What the family-independent tests need of a family: a tiny model, its inputs, and an oracle for its skips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine import Skip
from stg_engine.models import spec_of

Inputs = Mapping[str, Any]


@dataclass(frozen=True, eq=False)  # hashable, whatever it holds
class Case:
    """A tiny model of a family.

    name       family, and variant if there are several
    model      dtype -> the model, in eval mode, every weight random: zeros and ones of a new model hide mistakes
    inputs     (videos, dtype) -> (shared, cond, uncond), every prompt of another length where lengths can differ
    skipped    (model, skip) -> context in which a plain call of the model, on any rows, is the weak pass. Written from
               the published code: it must not use the ModelSpec
    layers     number of layers
    axes       what `Skip.axis` may be
    modes      which skips exist
    bitwise    modes whose weak rows are bit for bit those of `skipped` with serial execution; P5 has no module in
               diffusers to be equal to
    widths     in how many sizes blocks of one axis get a row's entries: more than one in a UNet
    call       further arguments of a plain call
    """

    name: str
    model: Callable[[torch.dtype], nn.Module]
    inputs: Callable[[int, torch.dtype], tuple[Inputs, Inputs, Inputs]]
    skipped: Callable[[nn.Module, Skip], AbstractContextManager[Any]]
    layers: int = 4
    axes: Sequence[str | None] = (None,)
    modes: Sequence[str] = ("residual", "attention")
    bitwise: Sequence[str] = ("residual", "attention")
    widths: int = 1
    call: Mapping[str, Any] = field(default_factory=lambda: {"return_dict": False})

    def __str__(self) -> str:
        return self.name

    def skips(self) -> list[Skip]:
        """First, last, middle and several layers, in every mode and axis; whole layers of factorised models too."""
        last = self.layers - 1
        choices = ((0,), (1,), (last,), (1, last))
        kinds = [(mode, axis) for mode in self.modes for axis in self.axes]
        if len(self.axes) > 1 and "residual" in self.modes:
            kinds.append(("residual", None))
        return [Skip(layers, mode=mode, axis=axis) for layers in choices for mode, axis in kinds]

    def passes(
        self, model: nn.Module, skips: Sequence[Skip], shared: Inputs, cond: Inputs, uncond: Inputs | None
    ) -> Any:
        """Every branch as plain calls of its own, video by video: {"cond": [one tensor per output], ...}."""
        results: dict[str, list[tuple[Tensor, ...]]] = {}
        spec = spec_of(model)
        total = len({**shared, **cond}[spec.latents[0]])
        for video in range(total):

            def plain(prompt: Inputs, at: int = video) -> tuple[Tensor, ...]:
                rows = {
                    name: value.chunk(total)[at]
                    if name in (*spec.latents, *spec.prompt) and value is not None
                    else value
                    for name, value in {**shared, **prompt}.items()
                }
                output = model(**rows, **self.call)
                return output if isinstance(output, tuple) else (output,)

            results.setdefault("cond", []).append(plain(cond))
            if uncond is not None:
                results.setdefault("uncond", []).append(plain(uncond))
            for i, skip in enumerate(skips):
                with self.skipped(model, skip):
                    results.setdefault(f"skip{i + 1}" if i else "skip", []).append(plain(cond))
        return {name: [torch.cat(parts) for parts in zip(*videos, strict=True)] for name, videos in results.items()}


def cases() -> list[Case]:
    """The cases of all files in `families/`."""
    names = sorted(path.stem for path in (Path(__file__).parent / "families").glob("*.py"))
    return [case for name in names for case in import_module(f"models.families.{name}").CASES]


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Every parameter random around what it was: norms, gates and tables that begin as zeros or ones too.

    A smaller `scale` where rounding grows from layer to layer beyond what fp32 is held to.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


@contextmanager
def block_inputs_returned(blocks: Sequence[nn.Module], streams: Sequence[str]) -> Iterator[None]:
    """The whole block skipped (P0): every one of `blocks` returns its arguments `streams`, in that order."""

    def pass_through(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        given = [kwargs[name] if name in kwargs else args[i] for i, name in enumerate(streams)]
        return tuple(given) if isinstance(output, tuple) else given[0]

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(pass_through, with_kwargs=True).remove)
        yield


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Every one of `modules` runs `forward(module, *args, **kwargs)`."""
    with ExitStack() as stack:
        for module in modules:
            module.forward = lambda *args, module=module, **kwargs: forward(module, *args, **kwargs)
            stack.callback(module.__dict__.pop, "forward")
        yield


def attention_with(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax over the keys that `mask` [..., S, K] allows, q k v [R, N, S, D]; a query without keys gets 0."""
    scores = (q.double() @ k.double().transpose(-1, -2)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ v.double()).to(q.dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


__all__ = [
    "Case",
    "Inputs",
    "attention_with",
    "block_inputs_returned",
    "cases",
    "randomise",
    "relative_error",
    "replaced_forwards",
]
