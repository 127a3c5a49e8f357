"""Schemas of namespace `stg`, and what each op returns: shapes and dtypes for tracing. Needs torch alone.

Two ops per kernel, one schema: `stg::<op>` runs the reference on CPU tensors and Triton on CUDA tensors,
`stg::<op>_native` runs csrc on both and is there once `stg_kernels._C` is loaded. `stg::branch_attention` dispatches.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

SCHEMAS = {
    "combine_guidance": (
        "(Tensor rows, Tensor scales, bool has_uncond, bool rescale=False, bool over_batch=False, "
        "bool cfg_star=False, ScalarType? dtype=None, Tensor? latents=None, Tensor? dt=None) -> Tensor"
    ),
    "norm_modulate": (
        "(Tensor x, Tensor? scale=None, Tensor? shift=None, Tensor? weight=None, Tensor? bias=None, float eps=1e-6, "
        "bool subtract_mean=False, Tensor? row_map=None) -> Tensor"
    ),
    "residual_gate": (
        "(Tensor x, Tensor y, Tensor? gate=None, Tensor? row_map=None, Tensor? pass_through=None) -> Tensor"
    ),
    "residual_gate_norm_modulate": (
        "(Tensor x, Tensor y, Tensor? gate=None, Tensor? scale=None, Tensor? shift=None, Tensor? weight=None, "
        "Tensor? bias=None, float eps=1e-6, bool subtract_mean=False, Tensor? row_map=None, "
        "Tensor? pass_through=None) -> (Tensor, Tensor)"
    ),
    "qk_norm_rope": (
        "(Tensor q, Tensor k, Tensor? q_weight=None, Tensor? k_weight=None, Tensor? q_bias=None, Tensor? k_bias=None, "
        "Tensor? cos=None, Tensor? sin=None, float eps=1e-6, bool per_head=False, bool subtract_mean=False, "
        "bool interleaved=True, Tensor? row_map=None) -> (Tensor, Tensor)"
    ),
    "branch_attention": (
        "(Tensor q, Tensor k, Tensor v, int[]? kv_rows=None, Tensor? key_lengths=None, int[]? value_rows=None, "
        "int[]? own_key_rows=None, int[]? text=None, float? scale=None, str? backend=None) -> Tensor"
    ),
}


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _combine_guidance(rows: Tensor, scales: Tensor, has_uncond: bool, *args: Any, **kwargs: Any) -> Tensor:
    names = ("rescale", "over_batch", "cfg_star", "dtype", "latents", "dt")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("latents") is not None:
        return _like(given["latents"])
    videos = rows.shape[0] // (scales.numel() - 1 + has_uncond)
    return rows.new_empty((videos, *rows.shape[1:]), dtype=given.get("dtype") or rows.dtype)


FAKES = {
    "combine_guidance": _combine_guidance,
    "norm_modulate": lambda x, *_, **__: _like(x),
    "residual_gate": lambda x, *_, **__: _like(x),
    "residual_gate_norm_modulate": lambda x, *_, **__: (_like(x), _like(x)),
    "qk_norm_rope": lambda q, k, *_, **__: (_like(q), _like(k)),
    "branch_attention": lambda q, *_, **__: _like(q),
}

FOLDERS = {name: name for name in SCHEMAS} | {
    "residual_gate_norm_modulate": "residual_gate",
    "branch_attention": "attention",
}
DISPATCHED = {"branch_attention"}
"""Ops that choose among libraries themselves."""


def _implementation(name: str, kind: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        module = import_module(f"stg_kernels.{FOLDERS[name]}.{kind}")
        return getattr(module, name)(*args, **kwargs)

    return call


_library = torch.library.Library("stg", "DEF")
for _name, _schema in SCHEMAS.items():
    for _op in (_name,) if _name in DISPATCHED else (_name, f"{_name}_native"):
        _library.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"stg::{_op}", FAKES[_name], lib=_library)
    for _device, _kind in (("CPU", "reference"), ("CUDA", "fused")):
        _library.impl(_name, _implementation(_name, "dispatch" if _name in DISPATCHED else _kind), _device)
