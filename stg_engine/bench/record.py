"""One measurement of one variant of one case: a row of a CSV file, an object of a JSON file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRow:
    """One guided step. Empty cells (None) were not measured; no row is written on a red parity gate.

    run        one invocation: all rows of a `run` were measured in turns in one process
    case, kind, title, tokens   see `Case`; `variant`, `is_exact` see `Variant`
    seconds    median of `samples`, `low` and `high` the quartiles
    block_rows computed per video; `bound` = block-rows of the engine with sharing off / these
    error      |guided - exact| / |exact|, L2; `exact`: the same weights in twice the precision (float32 of bfloat16,
               float64 of float32); `delta_error` that of c - p. Budgets: twice those of three plain passes in this
               dtype; None for a lossy variant
    cold_seconds    the first call in the process: compilation, capture, tuning
    peak_bytes      allocated during a step beyond what lay there before (CUDA)
    launches        kernels of one step (CUDA)
    kernels, attention    what the blocks and their attention ran
    gemm_flops, attention_flops, moved_bytes   of a step by the cost model (see `cost`)
    ideal_seconds   these at the ceilings below, which were measured in the same run
    matmul_flops, attention_ceiling, copy_bytes   FLOP/s, FLOP/s, bytes/s
    """

    run: str
    case: str
    kind: str
    title: str
    tokens: int
    variant: str
    is_exact: bool
    seconds: float
    low: float
    high: float
    samples: int
    block_rows: int
    bound: float
    error: float
    budget: float | None
    delta_error: float
    delta_budget: float | None
    cold_seconds: float
    peak_bytes: int | None
    launches: int | None
    kernels: str
    attention: str
    gemm_flops: float
    attention_flops: float
    moved_bytes: float
    ideal_seconds: float
    matmul_flops: float
    attention_ceiling: float
    copy_bytes: float
    dtype: str
    device: str
    threads: int
    clock_mhz: int | None
    driver: str
    cuda: str
    cudnn: str
    sdpa: str
    torch: str
    triton: str
    diffusers: str
    stg_engine: str
    commit: str
    date: str
