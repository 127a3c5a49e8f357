"""Three-pass STG, written to be obviously right: the oracle of the tests and the baseline of `generate --compare`.

Every branch is a full pass of an untouched LTX-Video transformer; nothing is shared. A skipped block is computed and
its result thrown away by a forward hook, as the published batched pipelines do: a step costs 3.0 pass-equivalents.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.config import Skip, STGConfig

# Arguments of the transformer with one entry per video that all branches share.
_LATENTS = ("hidden_states", "timestep", "video_coords")


def three_passes(
    transformer: nn.Module,
    config: STGConfig,
    shared: dict[str, Any],
    cond: dict[str, Any],
    uncond: dict[str, Any] | None,
    guidance_scale: float | Tensor,
    *,
    progress: float | None = None,
    sigma: float | None = None,
    token_sigmas: Tensor | None = None,
    one_batch: bool = False,
) -> Tensor:
    """Guided prediction of one step, [B, S, C] in the transformer's dtype.

    `u + g(c-u) + sum_i s_i (c-p_i)`, or `c + sum_i s_i (c-p_i)` without u; then times `r*std(c)/std(out) + (1-r)`,
    std with N-1, per sample or over the batch; which pass is weak and in which space, as `config` says. Arguments are
    those of `Denoiser.__call__`.
    A schedule's entry with a guidance scale of at most 1 drops u. `one_batch` runs the passes as one call on all their
    rows, else they are calls of their own, one after another.
    TypeError for a transformer without LTX-Video blocks, ValueError for one that an engine is attached to.
    """
    step = config.at(progress, sigma)
    x, level = shared["hidden_states"], sigma if token_sigmas is None else token_sigmas[..., None]
    if step.is_zero:
        return _from_x0(x.float() * 0, x.float(), level).to(x.dtype)
    if step.guidance_scale is not None:
        guidance_scale, uncond = step.guidance_scale, uncond if step.guidance_scale > 1 else None
    run = passes_in_one_batch if one_batch else passes_one_by_one
    branches = run(transformer, step.skips, shared, cond, uncond, config.weak_pass)
    dtype = branches["cond"].dtype
    if config.arithmetic == "float32":
        branches = {name: p.to(torch.promote_types(dtype, torch.float32)) for name, p in branches.items()}
    is_plain = step.is_plain
    if config.space == "x0" and not is_plain:
        x = x.to(branches["cond"].dtype)
        branches = {name: x - level * p for name, p in branches.items()}
    out = c = branches["cond"]
    if uncond is not None:
        u = branches["uncond"]
        if config.cfg_star and not is_plain:
            u = (c * u).flatten(1).sum(1)[:, None, None] / (u.flatten(1).square().sum(1)[:, None, None] + 1e-8) * u
        out = u + guidance_scale * (c - u)
    before = out if config.weak_pass == "negative_prompt" else c
    for skip, name in zip(step.skips, _names(step.skips), strict=True):
        if name in branches:
            out = out + skip.scale * (before - branches[name])
    if step.rescale > 0 and config.rescale_over == "sample":
        ratio = torch.stack([c_i.std() / out_i.std() for c_i, out_i in zip(c, out, strict=True)])[:, None, None]
        out = out * (step.rescale * ratio + (1 - step.rescale))
    elif step.rescale > 0:
        out = out * (step.rescale * c.std() / out.std() + (1 - step.rescale))
    if config.space == "x0" and not is_plain:
        out = _from_x0(out, x, level)
    return out.to(dtype)


def _from_x0(clean: Tensor, x: Tensor, level: Any) -> Tensor:
    """v of `x0 = x - sigma v`; tokens with sigma 0 do not move."""
    v = (x - clean) / level
    return torch.where(torch.isfinite(v), v, torch.zeros_like(v))


def passes_one_by_one(
    transformer: nn.Module,
    skips: Sequence[Skip],
    shared: dict[str, Any],
    cond: dict[str, Any],
    uncond: dict[str, Any] | None,
    weak_pass: str = "prompt",
) -> dict[str, Tensor]:
    """One plain call per branch: {"cond": [B, S, C], "uncond": ... if given, "skip": ..., "skip2": ..., ...}.

    `weak_pass` as in `STGConfig`: the skip passes read uncond's prompt, or there are none and uncond is skipped.
    """
    _check_plain(transformer)
    call = {**shared, "return_dict": False}
    branches = {"cond": transformer(**call, **cond)[0]}
    if uncond is not None:
        branches["uncond"] = transformer(**call, **uncond)[0]
    for name, skip in zip(_names(skips), skips, strict=True):
        name, prompt = _weak(name, weak_pass, cond, uncond)
        with skipped(transformer, skip.layers, skip.mode):
            branches[name] = transformer(**call, **prompt)[0]
    return branches


def passes_in_one_batch(
    transformer: nn.Module,
    skips: Sequence[Skip],
    shared: dict[str, Any],
    cond: dict[str, Any],
    uncond: dict[str, Any] | None,
    weak_pass: str = "prompt",
) -> dict[str, Tensor]:
    """The same predictions by one plain call on the rows of all branches."""
    _check_plain(transformer)
    weak = [_weak(name, weak_pass, cond, uncond) for name in _names(skips)]
    prompts = {"cond": cond, **({} if uncond is None else {"uncond": uncond}), **dict(weak)}
    videos = len(shared["hidden_states"])
    call = dict(shared)
    for name in _LATENTS:
        if call.get(name) is not None:
            call[name] = torch.cat([call[name]] * len(prompts))
    for name in cond:
        call[name] = None if cond[name] is None else torch.cat([prompt[name] for prompt in prompts.values()])
    with ExitStack() as stack:
        for (name, _), skip in zip(weak, skips, strict=True):
            index = list(prompts).index(name)
            rows = slice(index * videos, (index + 1) * videos)
            stack.enter_context(skipped(transformer, skip.layers, skip.mode, rows))
        output = transformer(**call, return_dict=False)[0]
    return dict(zip(prompts, output.chunk(len(prompts)), strict=True))


@contextmanager
def skipped(transformer: nn.Module, layers: Collection[int], mode: str, rows: slice = slice(None)) -> Iterator[None]:
    """While open, `transformer.transformer_blocks[k]`, k in `layers`, are skipped in `rows` of the batch.

    "residual": the block's output is its input. "attention": self-attention returns to_out(to_v(x)).
    """

    def input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[rows]

    def pass_through(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        output = output.clone()
        output[rows] = input_of(args, kwargs)
        return output

    def values(attention: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        output = output.clone()
        output[rows] = attention.to_out[0](attention.to_v(input_of(args, kwargs)))
        return output

    blocks: Any = transformer.transformer_blocks
    with ExitStack() as hooks:
        for layer in layers:
            block = blocks[layer]
            module, hook = {"residual": (block, pass_through), "attention": (block.attn1, values)}[mode]
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def moved_block_inputs(transformer: nn.Module) -> Iterator[None]:
    """While open, every value that enters a block is moved by one unit in the last place, up or down at random.

    What that does to a prediction is what rounding once more per block may do to it. The seed is fixed.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def move(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(0))
        signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device) * 2 - 1
        x = x + signs.to(x.dtype) * x.abs() * torch.finfo(x.dtype).eps
        return ((), {**kwargs, "hidden_states": x}) if "hidden_states" in kwargs else ((x, *args[1:]), kwargs)

    blocks: Any = transformer.transformer_blocks
    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(move, with_kwargs=True).remove)
        yield


def _names(skips: Sequence[Skip]) -> list[str]:
    return ["skip" if i == 0 else f"skip{i + 1}" for i in range(len(skips))]


def _weak(name: str, weak_pass: str, cond: dict[str, Any], uncond: Any) -> tuple[str, dict[str, Any]]:
    """Name and prompt of a weak pass. ValueError if it needs uncond and there is none."""
    if weak_pass != "prompt" and uncond is None:
        raise ValueError(f"weak_pass={weak_pass!r} needs uncond, which is None")
    return ("uncond" if weak_pass == "uncond" else name), (cond if weak_pass == "prompt" else uncond)


def _check_plain(transformer: nn.Module) -> None:
    blocks = getattr(transformer, "transformer_blocks", None)
    if blocks is None or not all(hasattr(block, "attn1") for block in blocks):
        raise TypeError(f"transformer: {type(transformer).__name__} has no LTX-Video blocks, the only ones known here")
    if any("stg_engine" in getattr(getattr(m, "_diffusers_hook", None), "hooks", {}) for m in (transformer, *blocks)):
        raise ValueError("transformer: an engine is attached to it; detach it before running the three-pass reference")


@contextmanager
def recorded_calls(transformer: nn.Module, indices: Collection[int]) -> Iterator[dict[int, dict[str, Any]]]:
    """While open, keep the keyword arguments of the calls of `transformer` with these numbers (0, 1, ...).

    Yields {call number: arguments}; tensors are the caller's own, which pipelines replace and do not overwrite.
    """
    calls: dict[int, dict[str, Any]] = {}
    count = 0

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal count
        if count in indices:
            calls[count] = dict(kwargs)
        count += 1

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
