"""STGGuidance: guided steps for pipelines that take a guider (diffusers' modular pipelines, HunyuanVideo-1.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from stg_engine.config import AudioGuidance, ScheduleEntry, Skip, STGConfig, STGSchedule, number
from stg_engine.denoiser import Denoiser
from stg_engine.hooks import GUIDER_HOOK, ArgumentHook, install, is_installed, remove


class STGGuidance(BaseGuidance):
    """STG as a guider: `pipe.update_components(guider=STGGuidance(3.0, STGConfig(layers=(19,))))`.

    guidance_scale  g of `u + g (c - u) + sum_i s_i (c - p_i)`; at most 1: no uncond branch
    stg             an `STGConfig` (or the dict that a saved guider holds); None takes the model's published preset
    execution, max_rows, kernels   see `Denoiser`

    One forward of the transformer per step; other guiders call it once per prediction. A schedule's sigma is
    timestep / 1000, that of flow-matching schedulers. The transformer stays hooked until `detach()`; outside this
    guider's steps it is as it was. Raises what `STGConfig` and `Denoiser` raise, the latter in the first step.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 (diffusers asks for a list)

    def __init__(
        self,
        guidance_scale: float = 3.0,
        stg: STGConfig | Mapping[str, Any] | None = None,
        execution: str = "batched",
        max_rows: int | None = None,
        kernels: str = "auto",
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled=enabled)
        self.guidance_scale = number("guidance_scale", guidance_scale, 0.0)
        self.stg = _config_of(stg)
        self._options: dict[str, Any] = {"execution": execution, "max_rows": max_rows, "kernels": kernels}
        self._denoisers: dict[nn.Module, Denoiser] = {}
        self._running: nn.Module | None = None
        self._prompts: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._converted: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.register_to_config(
            guidance_scale=guidance_scale, stg=None if self.stg is None else asdict(self.stg), **self._options
        )

    @property
    def num_conditions(self) -> int:
        """Of prompts, for the pipeline to know whether to encode the negative one."""
        return 2 if self._enabled else 1  # some pipelines want the negative prompt whatever the scale

    @property
    def is_conditional(self) -> bool:
        return True

    def prepare_inputs(self, data: Mapping[str, Any]) -> list[Any]:
        """One batch, that of the cond branch; what is a pair (cond, uncond) is kept for the others."""
        self._prompts = {name: value for name, value in data.items() if isinstance(value, tuple)}
        return [self._prepare_batch(data, 0, "pred_cond")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Mapping[str, Any]) -> list[Any]:
        """As `prepare_inputs`, for the fields of a modular pipeline's state."""
        pairs = ((name, names) for name, names in input_fields.items() if isinstance(names, tuple))
        self._prompts = {name: (getattr(data, c, None), getattr(data, u, None)) for name, (c, u) in pairs}
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred_cond")]

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Before the transformer's call: from here on it makes the guided prediction."""
        super().prepare_models(denoiser)
        if not self._enabled:
            return
        if denoiser not in self._denoisers:
            self._denoisers[denoiser] = Denoiser(denoiser, self.stg, **self._options)
            install(denoiser, _Takeover(self), GUIDER_HOOK)
        self._running = denoiser

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Behind the transformer's call."""
        self._running = None

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """The guided prediction, which the transformer's call returned."""
        if self._step + 1 == self._num_inference_steps:
            self.release()
        return GuiderOutput(pred=data[0].noise_pred, pred_cond=data[0].noise_pred, pred_uncond=None)

    def release(self) -> None:
        """Drop what is kept from step to step."""
        self._prompts, self._converted = {}, {}
        for denoiser in self._denoisers.values():
            denoiser.release()

    def detach(self) -> None:
        """Take the hooks off the transformers that this guider ran. Safe to call twice."""
        self.release()
        for model, denoiser in self._denoisers.items():
            if is_installed(model, GUIDER_HOOK):
                remove(model, GUIDER_HOOK)
            denoiser.detach()
        self._denoisers = {}

    def guided(self, model: nn.Module, forward: Any, arguments: dict[str, Any]) -> Any:
        """The transformer's call: the guided prediction in place of the cond branch's."""
        if self._running is not model:
            return forward(**arguments)
        self._running = None  # whatever happens; and the call below comes through here again
        denoiser, return_dict = self._denoisers[model], arguments.pop("return_dict", True)
        if return_dict:
            raise ValueError("return_dict=True is not allowed with STGGuidance; pipelines with guiders pass False")
        prompt = [name for name in denoiser.spec.prompt if name in arguments]
        shared = {name: value for name, value in arguments.items() if name not in prompt}
        cond, uncond = ({name: self._like(arguments[name], name, which) for name in prompt} for which in (0, 1))
        is_cfg = self.guidance_scale > 1
        guided = denoiser(
            shared,
            cond,
            uncond if is_cfg else None,
            guidance_scale=self.guidance_scale if is_cfg else None,
            progress=self._step / self._num_inference_steps,
            sigma=min(1.0, float(self._timestep) / 1000) if denoiser.config.needs_sigma else None,
        )
        return guided if isinstance(guided, tuple) else (guided,)

    def _like(self, given: Tensor | None, name: str, which: int) -> Tensor | None:
        """The cond (0) or uncond (1) tensor of a prompt argument in the dtype that the pipeline gives it.

        One object over all steps, so that what follows from it is found again.
        """
        source = self._prompts.get(name, (given, given))[which]
        if source is None or given is None or source.dtype == given.dtype:
            return source
        key = (id(source), given.dtype)
        if key not in self._converted:
            self._converted[key] = (source, source.to(given.dtype))
        return self._converted[key][1]


class _Takeover(ArgumentHook):
    """Hands a transformer's calls to the guider."""

    def __init__(self, owner: STGGuidance) -> None:
        super().__init__()
        self.owner = owner

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(self.bind(module, args, kwargs))
        return self.owner.guided(module, self.fn_ref.original_forward, arguments)


def _config_of(value: STGConfig | Mapping[str, Any] | None) -> STGConfig | None:
    if not isinstance(value, Mapping):
        return value
    fields: dict[str, Any] = {n: tuple(item) if isinstance(item, list) else item for n, item in value.items()}
    fields["extra_skips"] = tuple(Skip(**skip) for skip in fields.get("extra_skips", ()))
    if fields.get("audio") is not None:
        fields["audio"] = AudioGuidance(**fields["audio"])
    if fields.get("schedule") is not None:
        schedule = fields["schedule"]
        entries = tuple(ScheduleEntry(**entry) for entry in schedule["entries"])
        fields["schedule"] = STGSchedule(entries, schedule["rule"])
    return STGConfig(**fields)
