"""What a bug report needs to say about the machine: versions, device, attention backends, environment variables."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "xformers", "safetensors", "av")
# Listed by name or prefix, never all of them: an environment holds tokens.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PREFIXES = ("STG_", "HF_HUB_", "DIFFUSERS_", "TRITON_", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "NVIDIA_TF32_")
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY")


def versions() -> dict[str, str]:
    """Version of Python and of PACKAGES; "not installed" where there is none."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: str) -> str:
    """Name of the GPU, or of the processor and the number of threads torch uses."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def variables() -> dict[str, str]:
    """The set environment variables that change what torch, diffusers or the engine does."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name in _VARIABLES or name.startswith(_PREFIXES)) and not any(word in name for word in _SECRET)
    }


def describe() -> dict[str, str]:
    """The whole report, name -> value, in the order to print."""
    import torch
    from stg_kernels import native_devices

    lines = {**versions(), "executable": sys.executable, "platform": platform.platform(), "processor": processor()}
    lines["torch threads"] = str(torch.get_num_threads())
    compiled = ", ".join(sorted(native_devices()))
    lines["stg_kernels"] = f"compiled for {compiled}" if compiled else "not compiled: pip install --no-build-isolation"
    usable = "available" if torch.cuda.is_available() else "not available"
    lines["cuda"] = f"built for {torch.version.cuda or 'no CUDA'}, {usable}"
    lines["driver"] = driver()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines[f"gpu {index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.1f} GiB, {properties.multi_processor_count} SMs"
        )
    lines["attention (torch)"] = attention_priority()
    lines["attention (diffusers)"] = os.environ.get("DIFFUSERS_ATTN_BACKEND", "native (default)")
    lines["attention (stg_kernels)"] = _attention_choices()
    lines["environment"] = ", ".join(f"{name}={value}" for name, value in variables().items()) or "nothing relevant set"
    return lines


def attention_priority() -> str:
    """Order in which scaled_dot_product_attention tries its backends, and which of them are switched on."""
    import torch
    from torch.nn.attention import SDPBackend

    cuda = torch.backends.cuda
    on = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    order = getattr(torch._C, "_get_sdp_priority_order", None)  # private, and the only place that knows the order
    backends = [SDPBackend(i) for i in order()] if order else list(on)
    return " > ".join(f"{b.name.lower()}{'' if on[b] else ' (off)'}" for b in backends if b in on)


def _attention_choices() -> str:
    """The pinned backend, or how many choices were measured, and the file that holds them."""
    from stg_kernels.attention.choices import Choices, file
    from stg_kernels.attention.dispatch import named

    if pinned := os.environ.get("STG_ATTENTION"):
        try:
            return "pinned: " + ", ".join(backend.name for backend in named(pinned))
        except ValueError as error:
            return str(error)
    return f"{len(Choices().all())} measured, in {file()}"


def driver() -> str:
    """NVIDIA driver version by nvidia-smi, "none found" without it."""
    return _nvidia_smi("driver_version") or "none found"


def clock_mhz(device: Any) -> int | None:
    """The GPU's streaming multiprocessor clock at this moment; None where it is not known."""
    import torch

    if torch.device(device).type != "cuda":
        return None
    # nvidia-smi counts all GPUs of the machine, torch those in $CUDA_VISIBLE_DEVICES.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    answer = _nvidia_smi("clocks.sm", *([] if uuid is None else [f"--id=GPU-{uuid}"]))
    number = answer.removesuffix(" MHz")
    return int(number) if number.isdecimal() else None


def _nvidia_smi(query: str, *options: str) -> str:
    """Its first line of answer, why it failed, or "" where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed ({type(error).__name__})"
    return result.stdout.split("\n")[0].strip()


def processor() -> str:
    """Processor model as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
