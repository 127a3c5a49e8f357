"""Parts of blocks of more than one family."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from stg_kernels import branch_attention
from torch import Tensor, nn

from stg_engine.hooks import is_plain


def attend(
    processor: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, key_lengths: Tensor | None = None
) -> Tensor:
    """Attention [R, S, N, D], by the backend that was chosen in diffusers if one was.

    mask  broadcasts to [R, N, S, K]; key_lengths, if given, say the same
    """
    if (mask is None or key_lengths is not None) and not chosen_in_diffusers(processor):
        return branch_attention(q, k, v, key_lengths=key_lengths)
    out = dispatch_attention_fn(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=0.0,
        is_causal=False,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return out.to(q.dtype)


def chosen_in_diffusers(processor: Any) -> bool:
    """True if a backend or parallelism was set for the processor, or a backend for all."""
    return (
        processor._attention_backend is not None
        or processor._parallel_config is not None
        or _AttentionBackendRegistry.get_active_backend()[0] != AttentionBackendName.NATIVE
    )


def project_out(attention: Any, x: Tensor) -> Tensor:
    """[R, S, N, D] -> [R, S, C]."""
    projection, dropout = attention.to_out
    return dropout(projection(x.flatten(2, 3))).contiguous()


def feed_forward(ff: Any, x: Tensor) -> Tensor:
    """`ff(x)`, [R, S, C]; a `FeedForward` with GELU-tanh on CUDA with its first bias and GELU in the GEMM."""
    gelu, *rest = ff.net
    if not (x.is_cuda and _has_epilogue(gelu) and is_plain(ff)):
        return ff(x).contiguous()
    projection = gelu.proj
    # cuBLASLt adds the bias and applies GELU-tanh before the first GEMM's result reaches memory.
    x = torch._addmm_activation(projection.bias, x.flatten(0, 1), projection.weight.t(), use_gelu=True).unflatten(
        0, x.shape[:2]
    )
    for module in rest:
        x = module(x)
    return x.contiguous()


def _has_epilogue(gelu: Any) -> bool:
    return (
        type(gelu) is GELU
        and gelu.approximate == "tanh"
        and type(gelu.proj) is nn.Linear
        and type(gelu.proj.weight) is nn.Parameter  # a quantised weight is of a type of its own
        and gelu.proj.bias is not None
        and is_plain(gelu)
        and is_plain(gelu.proj)
    )
