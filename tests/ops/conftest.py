"""Without a CUDA device the Triton kernels run under Triton's interpreter, on CPU tensors."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before stg_kernels.*.fused is imported
