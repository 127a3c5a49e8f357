"""What the engine must know of a model family, as data. A new family is one `ModelSpec` and one `register` call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ModelSpec:
    """A transformer family. "Rows" are entries of dim 0; all names are argument names or module paths.

    family             name shown to users
    transformer        class name of the transformer; subclasses match too
    blocks             paths of the block lists, in the order in which the forward runs them
    latents            transformer arguments with one entry per video that all branches share
    prompt             transformer arguments with one entry per video that differ between cond and uncond
    prompt_mask        that of `prompt` which is 1 for tokens and 0 for padding [B, T], or None
    streams            block arguments that the block returns, in the order in which it returns them
    block_rows         further block arguments with one entry per row (a tensor or a tuple of tensors)
    shared_rows        those of block_rows that are equal in all branches
    self_attention     path of the self-attention inside a block
    attention_rows     its arguments with one entry per row; the first one is the input
    value_passthrough  (self-attention module, input [R, S, C]) -> [R, S, C]: attention skip, the result is V
    prompt_block       the first block that reads the prompt
    shares_attention   that block reads the prompt only after its self-attention
    once_per_step      modules whose row arguments are equal in all branches: path -> their positions in the call
    time_embedding     module that maps flat timesteps [R * n] to modulations ([R * n, ...], ...), or None
    once_per_prompt    modules of one argument that depend on prompt and weights alone, not on the timestep
    once_per_prompt_in_block   the same, paths inside each block
    per_row            further modules of one row argument, run `max_rows` rows at a time
    fused              module of `stg_engine.fused` with the block's forward from `stg_kernels`, or None
    presets            number of blocks -> name of the published preset
    """

    family: str
    transformer: str
    blocks: tuple[str, ...]
    latents: tuple[str, ...]
    prompt: tuple[str, ...]
    streams: tuple[str, ...]
    block_rows: tuple[str, ...]
    self_attention: str
    attention_rows: tuple[str, ...]
    value_passthrough: Callable[[nn.Module, Tensor], Tensor]
    prompt_block: int = 0
    shares_attention: bool = False
    prompt_mask: str | None = None
    once_per_step: dict[str, tuple[int, ...]] = field(default_factory=dict)
    time_embedding: str | None = None
    once_per_prompt: tuple[str, ...] = ()
    once_per_prompt_in_block: tuple[str, ...] = ()
    per_row: tuple[str, ...] = ()
    shared_rows: tuple[str, ...] = ()
    fused: str | None = None
    presets: dict[int, str] = field(default_factory=dict)

    def block_list(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's blocks in execution order; their positions are the layer numbers."""
        return [block for path in self.blocks for block in transformer.get_submodule(path)]

    def num_blocks(self, config: dict) -> int:
        """Number of blocks according to a transformer's `config.json`."""
        return int(config["num_layers"])


_SPECS: dict[str, ModelSpec] = {}


def register(spec: ModelSpec) -> ModelSpec:
    """Make a family known under its transformer's class name. Raises `ValueError` if the name is taken."""
    if spec.transformer in _SPECS and _SPECS[spec.transformer] != spec:
        raise ValueError(
            f"transformer={spec.transformer!r} is registered already, for {_SPECS[spec.transformer].family}"
        )
    _SPECS[spec.transformer] = spec
    return spec


def spec_of(transformer: nn.Module | type | str) -> ModelSpec:
    """The spec of a transformer, its class, or a class name. Raises `TypeError` that lists the supported ones."""
    if isinstance(transformer, str):
        names = [transformer]
    else:
        kind = transformer if isinstance(transformer, type) else type(transformer)
        names = [base.__name__ for base in kind.__mro__]
    for name in names:
        if name in _SPECS:
            return _SPECS[name]
    raise TypeError(f"no ModelSpec for {names[0]}; supported transformers: {', '.join(sorted(_SPECS))}")


def supported() -> tuple[ModelSpec, ...]:
    """All registered families."""
    return tuple(_SPECS.values())
