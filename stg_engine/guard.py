"""States of a transformer in which a guided step would be wrong, or is not supported: each is an error that says so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from stg_engine.hooks import EngineHook, hook_of, signature_of


def refuse_misfit(spec: Any, transformer: nn.Module, blocks: list[nn.Module]) -> None:
    """`ValueError` that names what a `ModelSpec` says and the model does not have."""
    kind = type(transformer).__name__
    if not blocks:
        raise ValueError(f"blocks={spec.blocks!r} of the ModelSpec for {spec.family} is nothing in this {kind}")
    if len({*map(id, blocks)}) < len(blocks):
        raise ValueError(f"blocks={spec.blocks!r} of the ModelSpec for {spec.family} names a block twice")
    for names, module in (((*spec.latents, *spec.prompt), transformer), (spec.streams, blocks[0])):
        known = signature_of(type(module)).parameters
        for name in names:
            if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                raise ValueError(
                    f"{name!r} of the ModelSpec for {spec.family} is no argument of {type(module).__name__}.forward; "
                    f"it has {', '.join(list(known)[1:])}"
                )


def refuse_compiled(transformer: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """`TypeError` for what `torch.compile` returned, `RuntimeError` for modules compiled in place."""
    if hasattr(transformer, "_orig_mod"):
        raise TypeError(
            "transformer is a torch.compile module; use the module that was compiled, transformer._orig_mod "
            "(in a pipeline: pipe.transformer = pipe.transformer._orig_mod)"
        )
    for module in (transformer, *blocks):
        if hasattr(module, "_orig_mod"):
            raise TypeError("transformer holds blocks that are torch.compile modules; put the blocks themselves back")
        if vars(module).get("_compiled_call_impl"):
            raise RuntimeError(
                "the transformer or its blocks are compiled (compile(), compile_repeated_blocks()), which stg_engine "
                "does not support yet; use a transformer that is not compiled"
            )


def refuse_in_guided_step(transformer: nn.Module, hooks: Iterable[tuple[EngineHook, Any]]) -> None:
    """`RuntimeError` for feature caches, gradient checkpointing, and for hooks (with their forwards) that were lost."""
    for module in transformer.modules():
        for hook in getattr(vars(module).get("_diffusers_hook"), "hooks", {}).values():
            if hook._is_stateful:
                raise RuntimeError(
                    f"a diffusers feature cache is on the transformer ({type(hook).__name__}); it keeps results of "
                    "a fixed batch and mixes up branches whose rows come and go. Switch it off "
                    "(transformer.disable_cache() if enable_cache() put it there), or set scale=0.0"
                )
    if torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False):
        raise RuntimeError(
            "gradient checkpointing runs blocks again after the guided forward has ended; call "
            "transformer.disable_gradient_checkpointing(), or run under torch.no_grad()"
        )
    for hook, forward in hooks:
        if hook.fn_ref.forward is not forward:
            raise RuntimeError(
                "another hook was taken off the transformer and took stg_engine's with it (diffusers puts an older "
                "forward back, for example in disable_cache()); detach and attach again"
            )


def refuse_offloading(transformer: nn.Module, *, is_below_its_hook: bool) -> None:
    """`RuntimeError` for hooks that move or cast weights while the forward runs.

    is_below_its_hook  what runs is below the transformer's own hook, which has moved it as a whole by then
    """
    for module in transformer.modules():
        found = [] if module is transformer and is_below_its_hook else [vars(module).get("_hf_hook")]
        hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
        found += [hook for hook in hooks.values() if not isinstance(hook, EngineHook)]
        for hook in filter(None, found):
            raise RuntimeError(
                f"{type(hook).__name__} is on the transformer: offloading and casting move weights while the forward "
                "runs, and a CUDA graph reads them where they were; take it off, or use graph=False"
            )


def refuse_left_out(spec: Any, expected: int, index: int) -> None:
    """`RuntimeError` if block `expected` ran past its hook. Where all rows are back between blocks, it may."""
    if index != expected and spec.between_blocks is None:
        raise RuntimeError(_LOST.format(f"block {expected}"))


def refuse_unhooked(index: int, block: nn.Module, kind: type[EngineHook], ran: set[int]) -> None:
    """`RuntimeError` unless all modules of the block that have a hook of this `kind` are in `ran`, by their ids."""
    if {id(module) for module in block.modules() if isinstance(hook_of(module), kind)} - ran:
        raise RuntimeError(_LOST.format(f"the self-attention of block {index}"))


_LOST = (
    "{} did not run through stg_engine's hook: something put another forward in its place, or the model left it out; "
    "detach and attach again"
)
