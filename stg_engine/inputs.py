"""The inputs of a guided step: checked, and laid out as rows for all branches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.hooks import signature_of
from stg_engine.memo import Fingerprint, Memo
from stg_engine.models import ModelSpec
from stg_engine.plan import Plan

Inputs = Mapping[str, Any]


def check_inputs(transformer: nn.Module, spec: ModelSpec, shared: Inputs, cond: Inputs, uncond: Inputs | None) -> int:
    """The number of videos B. Raises `ValueError` that names what is missing, misplaced or of the wrong size."""
    known = signature_of(type(transformer)).parameters
    groups = {"shared": shared, "cond": cond, "uncond": {} if uncond is None else uncond}
    for group, inputs in groups.items():
        if not isinstance(inputs, Mapping):
            raise TypeError(f"{group} is a {type(inputs).__name__}; it must be a dict of the transformer's arguments")
        for name in inputs:
            if name not in known or name in ("self", "return_dict"):
                raise ValueError(f"{group} holds {name!r}, which is not an argument of {type(transformer).__name__}")
            if (name in spec.prompt) == (group == "shared"):
                where = "cond and uncond" if group == "shared" else "shared"
                raise ValueError(f"{group} holds {name!r}; it belongs in {where}")
    if uncond is not None and set(uncond) != set(cond):
        raise ValueError(f"uncond holds {sorted(uncond)}; it must hold what cond holds, {sorted(cond)}")
    first = spec.latents[0]
    holder = "cond" if first in spec.prompt else "shared"
    if first not in groups[holder]:
        raise ValueError(f"{holder} holds {sorted(groups[holder])}; it must hold {first!r}")
    videos = len(groups[holder][first])
    if videos == 0:
        raise ValueError(f"{holder}[{first!r}] has no rows; it must have one per video")
    for group, inputs in groups.items():
        for name, value in inputs.items():
            if group == "uncond" and (value is None) != (cond[name] is None):
                with_it, without = ("cond", "uncond") if value is None else ("uncond", "cond")
                raise ValueError(f"{without}[{name!r}] is None and {with_it} has one; pass both or neither")
            if value is None or name not in (*spec.latents, *spec.prompt) or is_scalar(spec, name, value):
                continue
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise TypeError(f"{group}[{name!r}] is a {kind}; it must be a tensor with one entry per video")
            if value.ndim == 0:
                raise ValueError(f"{group}[{name!r}] is a single number; it must have one entry per video, {videos}")
            entries = len(value) // videos if name in spec.several_entries else 1
            if len(value) != max(entries, 1) * videos:
                raise ValueError(
                    f"{group}[{name!r}] has {len(value)} rows; {first} has {videos}. Pass every video once: the rows "
                    "of the branches are made here"
                )
            if group == "uncond" and value.shape != cond[name].shape:
                raise ValueError(
                    f"uncond[{name!r}] has shape {tuple(value.shape)}, cond has {tuple(cond[name].shape)}; "
                    "pad the prompts to one length and pass their masks"
                )
    return videos


def split_rows(spec: ModelSpec, arguments: Inputs, copies: int) -> tuple[dict, dict, dict | None]:
    """A pipeline's rows [uncond, cond] (copies=2) or [cond] (copies=1) as (shared, cond, uncond).

    uncond is None where copies=1. Raises `ValueError` if prompt and latents differ in their number of rows.
    """
    videos = arguments[spec.latents[0]].shape[0] // copies
    prompt = {name: arguments[name] for name in spec.prompt if name in arguments}
    shared = {name: value for name, value in arguments.items() if name not in prompt}
    shared.update({name: shared[name][:videos] for name in spec.latents if has_rows(spec, name, shared)})
    for name, value in prompt.items():
        # A callback may switch CFG off and leave the negative rows in front of the mask, which it cannot reach.
        if value is not None and len(value) != copies * videos and (copies, len(value)) != (1, 2 * videos):
            raise ValueError(f"{name} has {len(value)} rows, the latents have {copies * videos}; they must agree")
    cond = {name: value if value is None else value[-videos:] for name, value in prompt.items()}
    uncond = {name: value if value is None else value[:videos] for name, value in prompt.items()}
    return shared, cond, uncond if copies == 2 else None


def key_lengths(mask: Tensor, at_least: int = 1) -> Tensor:
    """Tokens per row of a mask [R, T] that is 1 for the first ones and 0 for padding, int32 [R] on the CPU.

    Empty if it is another kind of mask, or a row has fewer than `at_least`. Waits for the device.
    """
    if mask.ndim != 2:
        return torch.empty(0, dtype=torch.int32)
    mask = mask.cpu()
    lengths = (mask != 0).sum(1, dtype=torch.int32)
    is_first = torch.arange(mask.shape[1]) < lengths[:, None]
    return lengths if (mask == is_first).all() and (lengths >= at_least).all() else lengths[:0]


def prompt_lengths(spec: ModelSpec, rows: Inputs, count: int, memo: Memo) -> dict[str, Any]:
    """`Run`'s `lengths` and `full` for `count` rows, instead of a mask; empty where the mask says more."""
    mask = None if spec.prompt_mask is None else rows.get(spec.prompt_mask)
    if mask is None:
        return {"full": (True,) * count}
    at_least = 0 if spec.is_joint else 1  # beside the prompt there are other keys, or none
    lengths = memo.get("lengths", (mask,), lambda: key_lengths(mask, at_least))
    if not lengths.numel():
        return {}
    full = tuple((lengths == mask.shape[1]).tolist())
    return {"full": full, "lengths": memo.get("lengths there", (mask,), lambda: lengths.to(mask.device))}


def lengths_of(
    spec: ModelSpec, plan: Plan, videos: int, cond: Inputs, uncond: Inputs | None, memo: Memo
) -> dict[str, Any]:
    """`prompt_lengths` ahead of a forward that cannot wait for them; `memo` keeps nothing else."""
    prompts = [None if p is None else {name: p[name] for name in p if name == spec.prompt_mask} for p in (cond, uncond)]
    cond, uncond = prompts[0] or {}, prompts[1]
    memo.keep_only(Fingerprint((), []), (), kept_prompt(spec, cond, uncond))
    masks = all_rows(spec, plan.names, {}, cond, uncond, memo, plan.negative)
    return prompt_lengths(spec, masks, len(plan.names) * videos, memo)


def other_sources(latents: Tensor, shared: Inputs) -> Any:
    """What prompt keys and values follow from beside prompt and weights."""
    kind = latents.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    # The LoRA scale in attention_kwargs acts inside the forward, after the fingerprint.
    return autocast, repr(shared.get("attention_kwargs"))


def all_rows(
    spec: ModelSpec,
    names: tuple[str, ...],
    shared: Inputs,
    cond: Inputs,
    uncond: Inputs | None,
    memo: Memo | None = None,
    negative: Collection[str] = ("uncond",),
) -> dict[str, Any]:
    """Keyword arguments with the rows of branches `names`, [K * B, ...] in that order; `memo` keeps the prompts'.

    The branches in `negative` read uncond's prompt.
    """
    rows = dict(shared)
    for name in spec.latents:
        if has_rows(spec, name, shared):
            rows[name] = shared[name].repeat(len(names), *[1] * (shared[name].ndim - 1))
    for name, value in cond.items():
        other = value if uncond is None else uncond[name]
        if value is None:
            rows[name] = None
            continue

        def stack(value: Tensor = value, other: Tensor = other) -> Tensor:
            return torch.cat([other if branch in negative else value for branch in names])

        keeper = None if name in spec.latents else memo
        rows[name] = stack() if keeper is None else keeper.get((name, names), (value, other), stack)
    return rows


def kept_prompt(spec: ModelSpec, cond: Inputs, uncond: Inputs | None) -> list[Tensor | None]:
    """The tensors of the prompt that stay the same from step to step."""
    prompts = (cond,) if uncond is None else (cond, uncond)
    return [value for prompt in prompts for name, value in prompt.items() if name not in spec.latents]


def has_rows(spec: ModelSpec, name: str, inputs: Inputs) -> bool:
    value = inputs.get(name)
    return value is not None and not is_scalar(spec, name, value)


def is_scalar(spec: ModelSpec, name: str, value: Any) -> bool:
    """True for a single number, where `spec` allows one."""
    return name in spec.scalars and (not isinstance(value, Tensor) or value.ndim == 0)
