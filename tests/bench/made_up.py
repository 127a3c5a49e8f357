"""Rows that nobody measured, for tests of what is drawn and written from rows."""

from stg_engine.bench.ladder import BASELINES
from stg_engine.bench.record import StepRow

SECONDS = {
    "cfg": 0.200,
    "batched-passes": 0.300,
    "sequential-passes": 0.312,
    "best-attention": 0.270,
    "compiled-passes": 0.215,
    "max-autotune-passes": 0.212,
    "engine-unshared": 0.262,
    "engine-shared": 0.201,
    "engine-kernels": 0.170,
    "engine": 0.160,
    "engine-graph": 0.158,
    "engine-compiled": 0.161,
    "engine-compiled-graph": 0.159,
    "engine-serial": 0.168,
    "float8-engine": 0.135,
}


def step_row(variant: str, **changes) -> StepRow:
    """A row of LTX-Video 2B on a made-up GPU: 84 block-rows apart, 83 of them without the skipped block, 64 shared."""
    seconds = changes.pop("seconds", SECONDS[variant])
    shares = variant not in BASELINES and variant != "engine-unshared"
    block_rows = {"cfg": 56, "engine-unshared": 83}.get(variant, 64 if shares else 84)
    fields = {
        "run": "one",
        "case": "ltx-video-2b",
        "kind": "true",
        "title": "LTX-Video 2B, 768x512x121",
        "tokens": 6144,
        "variant": variant,
        "is_exact": not variant.startswith("float8"),
        "seconds": seconds,
        "low": seconds * 0.99,
        "high": seconds * 1.02,
        "samples": 20,
        "cold_l2": False,
        "block_rows": block_rows,
        "bound": 83 / block_rows,
        "error": 0.002,
        "budget": 0.005 if not variant.startswith("float8") else None,
        "delta_error": 0.01 if not variant.startswith("float8") else 0.31,
        "delta_budget": 0.03 if not variant.startswith("float8") else None,
        "cold_seconds": 5.0,
        "peak_bytes": 3 * 2**30 if variant in BASELINES else 2 * 2**30,
        "launches": 3000,
        "kernels": "off",
        "attention": "sdpa",
        "gemm_flops": 4.7e13,
        "attention_flops": 2.1e13,
        "moved_bytes": 4e10,
        "ideal_seconds": 0.110 if shares else 0.145,
        "matmul_flops": 7.9e14,
        "attention_ceiling": 5e14,
        "copy_bytes": 4.3e12,
        "dtype": "bfloat16",
        "device": "Made-up GPU",
        "threads": 1,
        "clock_mhz": 1980,
        "driver": "1",
        "cuda": "13.0",
        "cudnn": "9",
        "sdpa": "cudnn,flash",
        "torch": "2.13.0",
        "triton": "3.7.1",
        "diffusers": "0.42.1",
        "stg_engine": "0.1.0",
        "commit": "abc1234",
        "date": "2026-01-01",
    }
    return StepRow(**{**fields, **changes})


def ladder_rows(**changes) -> list[StepRow]:
    """One run of every variant; `times` multiplies seconds and ideal."""
    times = changes.pop("times", 1.0)
    rows = [step_row(variant) for variant in SECONDS]
    return [
        step_row(r.variant, **{"seconds": r.seconds * times, "ideal_seconds": r.ideal_seconds * times, **changes})
        for r in rows
    ]
