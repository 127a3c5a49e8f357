"""Three-pass STG, written to be obviously right: the oracle of the tests and the baseline of `generate --compare`.

Every branch is a full pass of an untouched transformer; nothing is shared. A skipped block is computed and its result
thrown away by a forward hook, as the published batched pipelines do: a step costs 3.0 pass-equivalents. The family's
`ModelSpec` gives the names of arguments and blocks, and what skipped self-attention returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.config import Skip, STGConfig
from stg_engine.hooks import is_installed, signature_of
from stg_engine.models import modules_at, modules_in_blocks, spec_of
from stg_engine.oracle import combined, from_x0, names_of, one_or_all


def three_passes(
    transformer: nn.Module,
    config: STGConfig,
    shared: Mapping[str, Any],
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any] | None,
    guidance_scale: float | Tensor,
    *,
    progress: float | None = None,
    sigma: float | None = None,
    token_sigmas: Tensor | Sequence[Tensor] | None = None,
    one_batch: bool = False,
) -> Any:
    """Guided prediction of one step, [B, ...] in the transformer's dtype; a tuple of them for several outputs (LTX-2).

    `u + g(c-u) + sum_i s_i (c-p_i) + (mu-1)(c-m)`, or without the terms in u; then times `r*std(c)/std(out) + (1-r)`,
    std with N-1, per sample or over the batch; which pass is weak and in which space, as `config` says. Arguments are
    those of `Denoiser.__call__`.
    A schedule's entry with a guidance scale of at most 1 drops u. `one_batch` runs the passes as one call on all their
    rows, else they are calls of their own, one after another.
    TypeError for a transformer without a `ModelSpec`, ValueError for one that an engine is attached to.
    """
    step, spec = config.at(progress, sigma), spec_of(transformer)
    latents = [{**shared, **cond}[name] for name in spec.velocity_of or spec.latents[:1]]
    per_token = [token_sigmas] if isinstance(token_sigmas, Tensor) else token_sigmas
    levels = [sigma] * len(latents) if per_token is None else [sigmas[..., None] for sigmas in per_token]
    if step.is_zero:
        zeros = [from_x0(x.float() * 0, x.float(), level) for x, level in zip(latents, levels, strict=True)]
        return one_or_all([v.to(x.dtype) for v, x in zip(zeros, latents, strict=True)])
    if step.guidance_scale is not None:
        guidance_scale, uncond = step.guidance_scale, uncond if step.guidance_scale > 1 else None
    run = passes_in_one_batch if one_batch else passes_one_by_one
    modality = step.modality_scale != 1
    branches = run(transformer, step.skips, shared, cond, uncond, config.weak_pass, modality=modality)
    return combined(transformer, config, step, branches, {**shared, **cond}, guidance_scale, levels)


def passes_one_by_one(
    transformer: nn.Module,
    skips: Sequence[Skip],
    shared: Mapping[str, Any],
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any] | None,
    weak_pass: str = "prompt",
    *,
    modality: bool = False,
) -> Any:
    """One plain call per branch: {"cond": [B, ...], "uncond": ... if given, "skip": ..., "skip2": ..., ...}.

    Of several outputs a tuple of these. `weak_pass` as in `STGConfig`: the skip passes read uncond's prompt, or there
    are none and uncond is skipped. With `modality` also "modality": cond with isolated modalities, as the LTX-2
    pipelines ask for it.
    """
    _check_plain(transformer)
    branches = {"cond": _outputs(transformer, shared, cond)}
    if uncond is not None:
        branches["uncond"] = _outputs(transformer, shared, uncond)
    for name, skip in zip(names_of(skips), skips, strict=True):
        name, prompt = _weak(name, weak_pass, cond, uncond)
        with skipped(transformer, skip):
            branches[name] = _outputs(transformer, shared, prompt)
    if modality:
        branches["modality"] = _outputs(transformer, shared, cond, {"isolate_modalities": True})
    return _by_output(branches)


def _by_output(branches: Mapping[str, Sequence[Tensor]]) -> Any:
    return one_or_all(
        [dict(zip(branches, of_output, strict=True)) for of_output in zip(*branches.values(), strict=True)]
    )


@contextmanager
def passes_apart(
    transformer: nn.Module,
    twins: Sequence[nn.Module],
    skips: Sequence[Skip],
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any] | None,
    weak_pass: str = "prompt",
    *,
    modality: bool = False,
) -> Iterator[Callable[[Mapping[str, Any]], Any]]:
    """While open, a function of `shared` that returns what `passes_one_by_one` does, for many steps of one prompt.

    twins   a module on the same weights for each skip, on which its hooks stay
    """
    calls = {"cond": (transformer, cond), **({} if uncond is None else {"uncond": (transformer, uncond)})}
    for name, twin in zip(names_of(skips), twins, strict=True):
        name, prompt = _weak(name, weak_pass, cond, uncond)
        calls[name] = twin, prompt
    if modality:
        calls["modality"] = transformer, {**cond, "isolate_modalities": True}

    def run(shared: Mapping[str, Any]) -> Any:
        return _by_output({name: _outputs(model, shared, prompt) for name, (model, prompt) in calls.items()})

    with ExitStack() as stack:
        for model in (transformer, *twins):
            _check_plain(model)
        for twin, skip in zip(twins, skips, strict=True):
            stack.enter_context(skipped(twin, skip))
        yield run


def passes_in_one_batch(
    transformer: nn.Module,
    skips: Sequence[Skip],
    shared: Mapping[str, Any],
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any] | None,
    weak_pass: str = "prompt",
    *,
    modality: bool = False,
) -> Any:
    """The same predictions by one plain call on the rows of all branches."""
    with one_batch_of_passes(transformer, skips, cond, uncond, weak_pass, modality=modality) as passes:
        return passes(shared)


@contextmanager
def one_batch_of_passes(
    transformer: nn.Module,
    skips: Sequence[Skip],
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any] | None,
    weak_pass: str = "prompt",
    *,
    modality: bool = False,
) -> Iterator[Callable[[Mapping[str, Any]], Any]]:
    """While open, a function of `shared` that returns what `passes_in_one_batch` does, for many steps of one prompt.

    The hooks stay on and the prompts are stacked once.
    """
    _check_plain(transformer)
    weak = [_weak(name, weak_pass, cond, uncond) for name in names_of(skips)]
    prompts = {"cond": cond, **({} if uncond is None else {"uncond": uncond}), **dict(weak)}
    if modality:
        prompts["modality"] = cond
    stacked = {
        name: None if value is None else torch.cat([prompt[name] for prompt in prompts.values()])
        for name, value in cond.items()
    }

    def run(shared: Mapping[str, Any]) -> Any:
        call = dict(shared)
        for name in spec_of(transformer).latents:
            if isinstance(call.get(name), Tensor) and call[name].ndim > 0:
                call[name] = torch.cat([call[name]] * len(prompts))
        outputs = _outputs(transformer, call, stacked)
        return one_or_all([dict(zip(prompts, output.chunk(len(prompts)), strict=True)) for output in outputs])

    with ExitStack() as stack:
        for (name, _), skip in zip(weak, skips, strict=True):
            stack.enter_context(skipped(transformer, skip, list(prompts).index(name), len(prompts)))
        if modality:
            stack.enter_context(_isolated(transformer, list(prompts).index("modality"), len(prompts)))
        yield run


def _outputs(transformer: nn.Module, *inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    options = {"return_dict": False} if "return_dict" in signature_of(type(transformer)).parameters else {}
    outputs = transformer(**{name: value for group in inputs for name, value in group.items()}, **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextmanager
def _isolated(transformer: nn.Module, branch: int, branches: int) -> Iterator[None]:
    """While open, attention between modalities adds nothing in one of the equal parts of the batch."""
    spec = spec_of(transformer)

    def cut(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output.chunk(branches)[branch].zero_()
        return output

    with ExitStack() as hooks:
        for module in modules_in_blocks(spec.block_list(transformer), spec.links):
            hooks.callback(module.register_forward_hook(cut).remove)
        yield


@contextmanager
def skipped(transformer: nn.Module, skip: Skip, branch: int = 0, branches: int = 1) -> Iterator[None]:
    """While open, `skip` is done in one of the equal parts of the batch.

    "residual": a block's outputs are its inputs. "attention": self-attention returns what the family's spec says.
    """
    spec = spec_of(transformer)

    def part(value: Any) -> Any:
        """That branch's entries of a tensor whose dim 0 is a multiple of the number of branches."""
        if isinstance(value, tuple | list):
            return type(value)(map(part, value))
        return value.chunk(branches)[branch] if isinstance(value, Tensor) else value

    def replaced(output: Any, new: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(replaced(a, b) for a, b in zip(output, new, strict=True))
        if output is None:
            return None
        output = output.clone()
        part(output).copy_(new)
        return output

    def pass_through(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        inputs = by_name(block, args, kwargs)
        streams = tuple(part(inputs[name]) for name in spec.streams)
        return replaced(output, streams if isinstance(output, tuple) else streams[0])

    def weak_attention(attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        inputs = by_name(attention, args, kwargs)
        rows = {name: part(value) if name in spec.attention_rows else value for name, value in inputs.items()}
        return replaced(output, spec.attention_skip(attention, rows))

    layers = [spec.block_list(transformer)[i :: len(spec.axes)] for i in range(len(spec.axes))]
    with ExitStack() as hooks:
        for axis, blocks in zip(spec.axes, layers, strict=True):
            for block in [blocks[layer] for layer in skip.layers if skip.axis in (None, axis)]:
                modules = [block] if skip.mode == "residual" else modules_at(block, spec.self_attention)
                hook = {"residual": pass_through, "attention": weak_attention}[skip.mode]
                for module in modules:
                    hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def moved_block_inputs(transformer: nn.Module) -> Iterator[None]:
    """While open, every value that enters a block is moved by one unit in the last place, up or down at random.

    What that does to a prediction is what rounding once more per block may do to it. The seed is fixed.
    """
    spec = spec_of(transformer)
    generators: dict[torch.device, torch.Generator] = {}

    def moved(x: Tensor) -> Tensor:
        generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(0))
        signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device) * 2 - 1
        return x + signs.to(x.dtype) * x.abs() * torch.finfo(x.dtype).eps

    def move(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        inputs = by_name(block, args, kwargs)
        return (), {name: moved(value) if name in spec.streams else value for name, value in inputs.items()}

    with ExitStack() as hooks:
        for block in spec.block_list(transformer):
            hooks.callback(block.register_forward_pre_hook(move, with_kwargs=True).remove)
        yield


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A module's arguments, positional and by keyword, as one dict."""
    if not args:
        return dict(kwargs)
    signature = signature_of(type(module))
    arguments = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    others = [name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]
    arguments.pop(next(iter(signature.parameters)))  # self
    return {**arguments, **(arguments.pop(others[0], {}) if others else {})}


def _weak(name: str, weak_pass: str, cond: Mapping[str, Any], uncond: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and prompt of a weak pass. ValueError if it needs uncond and there is none."""
    if weak_pass != "prompt" and uncond is None:
        raise ValueError(f"weak_pass={weak_pass!r} needs uncond, which is None")
    return ("uncond" if weak_pass == "uncond" else name), (cond if weak_pass == "prompt" else uncond)


def _check_plain(transformer: nn.Module) -> None:
    spec = spec_of(transformer)
    if any(map(is_installed, (transformer, *spec.block_list(transformer)))):
        raise ValueError("transformer: an engine is attached to it; detach it before running the three-pass reference")


Call = tuple[nn.Module, dict[str, Any]]


@contextmanager
def recorded_calls(models: Sequence[nn.Module], step: Callable[[], int | None]) -> Iterator[dict[int, list[Call]]]:
    """While open, keep the calls of `models` for which `step()` is not None, by that number.

    Yields {step: [(model, arguments by name), ...]}; tensors are the caller's own, which pipelines replace and do not
    overwrite.
    """
    calls: dict[int, list[Call]] = {}

    def record(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        number = step()
        if number is not None:
            calls.setdefault(number, []).append((model, by_name(model, args, kwargs)))

    with ExitStack() as hooks:
        for model in models:
            hooks.callback(model.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield calls
