"""diffusers hooks: installed below Accelerate's wrappers, taken off without a trace, and what they see of a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from torch.nn.modules import module as torch_module

Forward = Callable[..., Any]
HOOK_NAME = "stg_engine"
PIPELINE_HOOK, GUIDER_HOOK = "stg_engine_pipeline", "stg_engine_guider"


class EngineHook(ModelHook):
    """A hook of this package. It cannot be copied: a copy of a hooked module would run the original's weights.

    installed  the forward that `install` put on the module
    """

    installed: Any = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("stg_engine is on this transformer; detach it before you copy or pickle the transformer")


def signature_of(kind: Any) -> inspect.Signature:
    """Of the class's forward; a subclass that hands everything on by *args and **kwargs has that of its parent."""
    return _signature_of(kind)


@cache  # inspecting a forward takes as long as all other checks of a step
def _signature_of(kind: Any) -> inspect.Signature:
    signatures = [inspect.signature(vars(base)["forward"]) for base in kind.__mro__ if "forward" in vars(base)]
    kinds = {s: [p.kind for p in s.parameters.values()] for s in signatures}
    named = (s for s in signatures if inspect.Parameter.VAR_POSITIONAL not in kinds[s])
    most = max(signatures, key=lambda s: kinds[s].count(inspect.Parameter.POSITIONAL_OR_KEYWORD))
    return next(named, most)


class ArgumentHook(EngineHook):
    """A hook that sees its module's arguments by name."""

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.signature = signature_of(type(module))
        names = (name for name, p in self.signature.parameters.items() if p.kind is p.VAR_KEYWORD)
        self.further = next(names, "")
        return module

    def bind(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positional and keyword arguments as one dict by name."""
        if not args:
            return kwargs
        bound = self.signature.bind_partial(module, *args, **kwargs).arguments
        arguments = {k: v for k, v in bound.items() if k not in ("self", self.further)}
        return {**arguments, **bound.get(self.further, {})}


def runs_own_forward(module: nn.Module) -> bool:
    """True if below this package's hook lies the forward of the module's class, nothing else."""
    hook = hook_of(module)
    inner = module.forward if hook is None else hook.fn_ref.original_forward
    return getattr(inner, "__func__", None) is type(module).forward


def is_plain(module: nn.Module) -> bool:
    """True if calling the module runs its class's forward alone, but for the hook of this package."""
    attributes, hook = vars(module), hook_of(module)
    outer = None if hook is None else hook.installed
    return (
        not attributes["_forward_hooks"]
        and not attributes["_forward_pre_hooks"]
        and "_hf_hook" not in attributes
        and attributes.get("forward") is outer
        and runs_own_forward(module)
    )


def has_global_hooks() -> bool:
    """True if every module's call runs forward hooks: `torch.nn.modules.module.register_module_forward_hook`."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


@contextmanager
def below_accelerate(module: nn.Module) -> Iterator[None]:
    """Work under Hugging Face Accelerate's wrapper of `module.forward`, which offloading takes off and puts back."""
    outer = module.__dict__.get("forward") if hasattr(module, "_hf_hook") else None
    if outer is not None:
        module.forward = module._old_forward
    try:
        yield
    finally:
        if outer is not None:
            module._old_forward, module.forward = module.forward, outer


def install(module: nn.Module, hook: ModelHook, name: str = HOOK_NAME) -> Forward:
    """Register `hook` on `module`; returns the forward that runs it. Raises `ValueError` if the name is taken."""
    with below_accelerate(module):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
        hook.installed = module.forward
        return module.forward


def remove(module: nn.Module, name: str = HOOK_NAME) -> None:
    """Take the hook off; the module's attributes are as they were before `install`."""
    registry = module._diffusers_hook
    with below_accelerate(module):
        references = registry._fn_refs[registry._hook_order.index(name) :]
        later = references[1] if len(references) > 1 else None
        kept = None if later is None else later.forward
        registry.remove_hook(name, recurse=False)
        if later is not None and later.original_forward is not None:
            # diffusers puts the inner forward in the place of the later hook's own.
            later.original_forward, later.forward = references[0].original_forward, kept
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    if not registry.hooks:
        del module._diffusers_hook


def hook_of(module: nn.Module, name: str = HOOK_NAME) -> Any:
    """The hook of that name on `module`, or None."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def is_installed(module: nn.Module, name: str = HOOK_NAME) -> bool:
    """True if a hook of that name is registered on `module`."""
    return hook_of(module, name) is not None
