"""The specification in plain torch; float32 arithmetic, float64 for float64 input."""

from __future__ import annotations

import torch
from torch import Tensor


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    per_head: bool = False,
    subtract_mean: bool = False,
    interleaved: bool = True,
    row_map: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `stg_kernels.qk_norm_rope`."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    dims = (-1,) if per_head else (-2, -1)

    def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        out = x.to(compute)
        if subtract_mean:
            out = out - out.mean(dims, keepdim=True)
        out = out * torch.rsqrt(out.square().mean(dims, keepdim=True) + eps)
        shape = out.shape[-1:] if per_head else out.shape[-2:]
        if weight is not None:
            out = out * weight.to(compute).reshape(shape)
        if bias is not None:
            out = out + bias.to(compute).reshape(shape)
        return out

    def rotated(x: Tensor) -> Tensor:
        if cos is None or sin is None:
            return x
        table_cos, table_sin = ((t if row_map is None else t[row_map]).to(compute) for t in (cos, sin))
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        pair = (a * table_cos - b * table_sin, b * table_cos + a * table_sin)
        return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)

    q_out, k_out = rotated(normed(q, q_weight, q_bias)), rotated(normed(k, k_weight, k_bias))
    return q_out.to(q.dtype).contiguous(), k_out.to(k.dtype).contiguous()
