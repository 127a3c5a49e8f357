"""Kernels for guided video diffusion: everything in a step that is not a matrix product.

Letters: R rows, S tokens, C channels, N heads, D head size, B videos, K branches.
"""

from stg_kernels.attention.api import branch_attention
from stg_kernels.choose import DTYPES, accelerates, native_devices
from stg_kernels.combine_guidance.api import combine_guidance
from stg_kernels.norm_modulate.api import norm_modulate
from stg_kernels.qk_norm_rope.api import qk_norm_rope
from stg_kernels.residual_gate.api import residual_gate, residual_gate_norm_modulate

__all__ = [
    "DTYPES",
    "accelerates",
    "branch_attention",
    "combine_guidance",
    "native_devices",
    "norm_modulate",
    "qk_norm_rope",
    "residual_gate",
    "residual_gate_norm_modulate",
]
