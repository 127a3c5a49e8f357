"""What ran: plan, kernels, seconds, memory."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from stg_engine.config import STGConfig
from stg_engine.plan import Plan, Plans


@dataclass
class Report:
    """Of one denoising loop. `str()` of it is for people.

    attention     per kind of attention the backend that fused blocks ran; without such blocks diffusers' backend
    graphs        CUDA graphs: how many were captured and how often they ran; "": not asked for
    compiled      the blocks that `torch.compile` ran and why it did not run others, in the last step; "": not asked for
    guided_steps  steps with skip branches; the others are plain diffusers
    seconds       wall clock of the loop, the device waited for at its end
    peak_bytes    largest memory allocated on the CUDA device since the loop began, None elsewhere
    note          what of the call's own settings is not used, and why
    differences   per skip branch: max |c - p| in its first step; 0 means that the skip changes nothing
    strong        "c", or "u" where the weak pass is on the negative prompt
    setting       what was attached, in words
    """

    family: str
    plan: Plan | Plans
    execution: str
    kernels: str
    attention: tuple[str, ...]
    device: str
    dtype: str
    graphs: str = ""
    compiled: str = ""
    steps: int = 0
    guided_steps: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None
    note: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    strong: str = "c"
    setting: str = ""

    def __str__(self) -> str:
        lines = [str(self.plan), ""]
        per_step = f", {self.seconds / self.steps:.3g} s per step" if self.steps else ""
        lines.append(f"model      {self.family}, {self.dtype} on {self.device}")
        lines.append(f"steps      {self.steps}, {self.guided_steps} with skip branches; {self.seconds:.3g} s{per_step}")
        lines.append(f"setting    {self.setting}")
        lines.append(f"execution  {self.execution}")
        lines.append(f"kernels    {self.kernels}")
        if self.graphs:
            lines.append(f"graphs     {self.graphs}")
        if self.compiled:
            lines.append(f"compiled   {self.compiled}")
        lines += [f"attention  {line}" for line in self.attention]
        if self.peak_bytes is not None:
            lines.append(f"memory     {self.peak_bytes / 2**20:.0f} MiB at the peak")
        if self.note:
            lines.append(f"note       {self.note}")
        for name, value in self.differences.items():
            note = ": this skip changes nothing, its rows are computed for no effect" if value == 0 else ""
            lines.append(f"{name:<9}  max |{self.strong} - p| = {value:.3g} in its first step{note}")
        return "\n".join(lines)


def attention_backend(attention: nn.Module) -> str:
    """Name of the diffusers backend that a self-attention module dispatches to."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend = getattr(getattr(attention, "processor", None), "_attention_backend", None)
    if backend is None:
        backend = _AttentionBackendRegistry.get_active_backend()[0]
    return f"diffusers {getattr(backend, 'value', backend)}"


def new_report(denoiser: Any, plan: Plan | Plans, device: torch.device) -> Report:
    """An empty report of a `Denoiser` that runs on `device`, which offloaded weights do not tell."""
    return Report(
        family=denoiser.spec.family,
        plan=plan,
        execution=denoiser.execution if denoiser.max_rows in (None, 1) else f"at most {denoiser.max_rows} rows at once",
        kernels=denoiser.fusion.used,
        compiled="" if denoiser.compiler is None else denoiser.compiler.used,
        attention=(attention_backend(denoiser.blocks[0].get_submodule(denoiser.spec.self_attention[0])),),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        dtype=str(denoiser.transformer.dtype).removeprefix("torch."),
        strong="u" if denoiser.config.weak_pass == "negative_prompt" else "c",
        setting=_in_words(denoiser.config),
    )


def _in_words(config: STGConfig) -> str:
    """The fields that differ from their defaults, but for a schedule's entries."""
    changed = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    if config.schedule is not None:
        changed["schedule"] = f"{len(config.schedule.entries)} entries"
    return ", ".join(
        f"{name}={value}" for name, value in {"scale": config.scale, "mode": config.mode, **changed}.items()
    )
