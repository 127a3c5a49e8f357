"""What the engine must know of a model family, as data. A new family is one `ModelSpec` and one `register` call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

AttentionSkip = Callable[["nn.Module", Mapping[str, Any]], Any]
"""(self-attention module, its arguments by name for the rows that skip) -> what the module returns"""

SelectRows = Callable[[Mapping[str, Any], Sequence[int], int], Mapping[str, Any]]
"""(a block's arguments by name, row numbers, number of rows there) -> those of the arguments that change, by name"""


def value_passthrough(attention: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Self-attention whose map is the identity: `to_out(to_v(x))`, [R, S, C] -> [R, S, C] (arXiv 2411.18664 Eq. 17)."""
    projection, dropout = attention.to_out
    return dropout(projection(attention.to_v(arguments["hidden_states"])))


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A transformer (or UNet) family.

    "Rows": every branch owns one per video, and a tensor "with rows" has dim 0 = rows x n, the n entries of a row
    adjacent: n = 1, or frames, or patches. All names are argument names or module paths; in a path `*` stands for every
    child, in order, and a path that a model does not have (or that is None there) is left out.

    family             name shown to users
    transformer        class name of the transformer; subclasses match too
    blocks             paths of the blocks in the order in which the forward runs them; their places are the layers
    temporal_blocks    in factorised models: the temporal blocks, one behind each of `blocks`, which are spatial then
    count_layers       a transformer's config.json -> the number of `blocks`
    latents            transformer arguments with rows; equal in all branches but for those also in `prompt`, of which
                       nothing is kept. The first one tells the number of videos
    scalars            those of latents that may be a single number instead, for all videos
    prompt             transformer arguments with rows that differ between cond and uncond
    several_entries    those of `prompt` of which a row may have more than one entry; the others have one
    prompt_mask        that of `prompt` which is 1 for tokens and 0 for padding [B, T], or None
    streams            block arguments that the block returns, in the order in which it returns them
    block_rows         further block arguments with rows (a tensor or a tuple of tensors)
    select_rows        selects rows of block arguments that have them in another form: prompts packed into one sequence
    shared_rows        those of block_rows that are equal in all branches
    prompt_rows        those of block_rows that follow from prompt and weights alone
    between_blocks     None: the forward hands a block's result to the next block and to nothing else that counts rows;
                       else the costly modules that it runs between blocks: path -> their row arguments (may be empty)
    self_attention     paths of the self-attentions inside a block
    attention_rows     their arguments with rows
    attention_skip     what skipping rows get for self-attention: P1 or P5 of the published code
    links              paths inside a block of attention between modalities, which the modality branch cuts
    prompt_block       the first block that reads the prompt; -1: it enters before the blocks
    shares_attention   that block reads the prompt only after its self-attention
    once_per_step      modules whose row arguments are equal in all branches: path -> those, by position or name
    time_embedding     modules that map flat timesteps [rows * n] to modulations ([rows * n, ...], ...)
    once_per_prompt    modules of one argument that depend on prompt and weights alone, not on the timestep
    once_per_prompt_in_block   the same, paths inside each block
    one_key_attention  paths inside a block of diffusers' `Attention` to the prompt; where that has a single token, the
                       result is `to_out(to_v(prompt))` for every query: once per prompt, if `max_rows` is None
    per_row            further modules with rows: path -> their row arguments; they get `max_rows` rows at a time
    fused              module of `stg_engine.fused` with the block's forward from `stg_kernels`, or None
    velocity_of        per output, the argument x of `latents` with `x0 = x - sigma * output`, of the output's shape;
                       () if the model predicts something else
    waits_in           "blocks" or "forward" where the modules' own forward of the blocks, or the transformer's around
                       them, waits for the device, so that no CUDA graph can hold it; else ""
    presets            number of layers -> name of the published preset
    """

    family: str
    transformer: str
    blocks: tuple[str, ...]
    latents: tuple[str, ...]
    prompt: tuple[str, ...]
    streams: tuple[str, ...]
    block_rows: tuple[str, ...]
    self_attention: tuple[str, ...]
    attention_rows: tuple[str, ...]
    attention_skip: AttentionSkip
    temporal_blocks: tuple[str, ...] = ()
    count_layers: Callable[[Mapping[str, Any]], int] = lambda config: config["num_layers"]
    scalars: tuple[str, ...] = ()
    several_entries: tuple[str, ...] = ()
    prompt_mask: str | None = None
    select_rows: SelectRows | None = None
    shared_rows: tuple[str, ...] = ()
    prompt_rows: tuple[str, ...] = ()
    between_blocks: Mapping[str, tuple[int | str, ...]] | None = None
    links: tuple[str, ...] = ()
    prompt_block: int = 0
    shares_attention: bool = False
    once_per_step: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    time_embedding: tuple[str, ...] = ()
    once_per_prompt: tuple[str, ...] = ()
    once_per_prompt_in_block: tuple[str, ...] = ()
    one_key_attention: tuple[str, ...] = ()
    per_row: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    fused: str | None = None
    velocity_of: tuple[str, ...] = ()
    waits_in: str = ""
    presets: Mapping[int, str] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """What an STG `axis` may be: (None,), or ("spatial", "temporal") in factorised models."""
        return ("spatial", "temporal") if self.temporal_blocks else (None,)

    @property
    def is_joint(self) -> bool:
        """True if the prompt is one of the streams, so that its tokens are in the self-attention."""
        return not set(self.prompt).isdisjoint(self.streams)

    def block_list(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's blocks in execution order: layer by layer, in factorised models spatial before temporal."""
        lists = [modules_at(transformer, paths) for paths in (self.blocks, self.temporal_blocks) if paths]
        return [block for layer in zip(*lists, strict=True) for block in layer]

    def num_layers(self, config: Mapping[str, Any]) -> int:
        """Number of layers according to a transformer's `config.json`."""
        return int(self.count_layers(config))

    def plan_options(self, *, is_on: bool = True) -> dict[str, Any]:
        """Keyword arguments of `Plan.build`; without a skip branch (`is_on=False`) it is plain diffusers that runs."""
        return {
            "axes": self.axes,
            "prompt_block": self.prompt_block,
            "shares_attention": self.shares_attention and is_on,
        }


def modules_at(root: nn.Module, paths: tuple[str, ...]) -> list[nn.Module]:
    """The modules at `paths` below `root`, path by path; `*` is every child, in order. Missing ones are left out."""
    found = []
    for path in paths:
        level: list[Any] = [root]
        for name in path.split("."):
            level = [
                child
                for module in level
                for child in (module.children() if name == "*" else [getattr(module, name, None)])
                if child is not None
            ]
        found += level
    return found


def modules_in_blocks(blocks: Sequence[nn.Module], paths: tuple[str, ...]) -> list[nn.Module]:
    """The modules at `paths` below each of `blocks`, block by block."""
    return [module for block in blocks for module in modules_at(block, paths)]


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
