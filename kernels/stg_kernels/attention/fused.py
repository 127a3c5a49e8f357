"""Triton: FlashAttention-2 (arXiv 2307.08691) over rows that may share keys, with key lengths and own keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stg_kernels._triton import outer_strides
from stg_kernels.attention.parts import Part

LOG2_E = 1.4426950408889634

RUNTIME_SIZES = ["tiles", "heads", "queries", "keys", "key_start"]
RUNTIME_STRIDES = [f"{x}_{dim}" for x in ("q", "k", "v", "own_k", "own_v", "out") for dim in ("row", "token", "head")]


@triton.jit
def _address(x, row, token, head, stride_row, stride_token, stride_head, VEC: tl.constexpr):
    """Of a token's vector; VEC elements divide its 64-bit offset."""
    offset = row.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head + stride_token.to(tl.int64) * token
    return x + tl.multiple_of(offset, VEC)


@triton.jit
def _load(
    x, row, token, head, stride_row, stride_token, stride_head, tokens,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_PARTIAL: tl.constexpr, DESCRIPTORS: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens from `token` on, [BLOCK, BLOCK_D]; 0 beyond D, and beyond `tokens` where IS_PARTIAL."""
    if DESCRIPTORS:
        return x.load([row, head, token, 0]).reshape(BLOCK, BLOCK_D)
    else:
        i = tl.arange(0, BLOCK)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        at = _address(x, row, token, head, stride_row, stride_token, stride_head, VEC)
        at += i * (stride_token // VEC * VEC) + d  # the same stride, known to be a multiple
        if IS_PARTIAL:
            return tl.load(at, (i < tokens - token) & (d < D), other=0.0)
        else:
            return tl.load(at, d < D, other=0.0)


@triton.jit
def _attend(
    acc, l, m, q, k, v, scale, count, BLOCK_N: tl.constexpr, IS_PARTIAL: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Takes one tile of keys into the running sum `acc`, its weight `l` and the largest score `m`, in powers of 2."""
    if PRECISION is not None:
        q, k = q.to(tl.float32), k.to(tl.float32)
    scores = tl.dot(q, k.trans(), input_precision=PRECISION)
    if IS_PARTIAL:
        scores = tl.where(tl.arange(0, BLOCK_N)[None, :] < count, scores, -float("inf"))
    m_new = tl.maximum(m, tl.max(scores, axis=1) * scale)
    p = tl.exp2(scores * scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, axis=1)
    p = p.to(v.dtype)
    if PRECISION is not None:
        p, v = p.to(tl.float32), v.to(tl.float32)
    acc = tl.dot(p, v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, l, m_new


@triton.jit
def _queries(
    tile, q, k, v, own_k, own_v, out, kv_rows, key_lengths,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    own_k_row, own_k_token, own_k_head, own_v_row, own_v_token, own_v_head, out_row, out_token, out_head,
    heads, queries, keys, key_start, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_KV_ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, OWN_KEY: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one row; tiles that follow each other share a head's keys in L2."""
    blocks = tl.cdiv(queries, BLOCK_M)
    start = tile % blocks * BLOCK_M
    head = tile // blocks % heads
    row = tile // blocks // heads
    kv_row = row
    if HAS_KV_ROWS:
        kv_row = tl.load(kv_rows + row)
    end = keys
    if HAS_LENGTHS:
        end = tl.minimum(tl.maximum(tl.load(key_lengths + kv_row) - key_start, 0), keys)
    q_tile = _load(
        q, row, start, head, q_row, q_token, q_head, queries, BLOCK_M, D, BLOCK_D, True, DESCRIPTORS, VEC
    )  # fmt: skip
    if OWN_KEY:
        own = _load(
            own_k, kv_row, start, head, own_k_row, own_k_token, own_k_head, queries, BLOCK_M, D, BLOCK_D, True, False,
            VEC,
        )  # fmt: skip
        m = tl.sum(q_tile.to(tl.float32) * own.to(tl.float32), axis=1) * scale
        l = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = _load(
            own_v, kv_row, start, head, own_v_row, own_v_token, own_v_head, queries, BLOCK_M, D, BLOCK_D, True, False,
            VEC,
        ).to(tl.float32)  # fmt: skip
    else:
        m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = end // BLOCK_N * BLOCK_N
    for token in range(0, full, BLOCK_N):
        k_tile = _load(
            k, kv_row, token, head, k_row, k_token, k_head, keys, BLOCK_N, D, BLOCK_D, False, DESCRIPTORS, VEC
        )  # fmt: skip
        v_tile = _load(
            v, kv_row, token, head, v_row, v_token, v_head, keys, BLOCK_N, D, BLOCK_D, False, DESCRIPTORS, VEC
        )  # fmt: skip
        acc, l, m = _attend(acc, l, m, q_tile, k_tile, v_tile, scale, BLOCK_N, BLOCK_N, False, PRECISION)
    if full < end:
        k_tile = _load(
            k, kv_row, full, head, k_row, k_token, k_head, end, BLOCK_N, D, BLOCK_D, True, DESCRIPTORS, VEC
        )  # fmt: skip
        v_tile = _load(
            v, kv_row, full, head, v_row, v_token, v_head, end, BLOCK_N, D, BLOCK_D, True, DESCRIPTORS, VEC
        )  # fmt: skip
        if DESCRIPTORS and HAS_LENGTHS:  # values beyond the length may be NaN, which a weight of 0 keeps
            v_tile = tl.where(tl.arange(0, BLOCK_N)[:, None] < end - full, v_tile, 0.0)
        acc, l, m = _attend(acc, l, m, q_tile, k_tile, v_tile, scale, end - full, BLOCK_N, True, PRECISION)
    acc = acc / tl.where(l == 0, 1.0, l)[:, None]  # no keys: 0
    if DESCRIPTORS:
        out.store([row, head, start, 0], acc.to(out.dtype).reshape(1, 1, BLOCK_M, BLOCK_D))
    else:
        i = tl.arange(0, BLOCK_M)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        at = _address(out, row, start, head, out_row, out_token, out_head, VEC) + i * (out_token // VEC * VEC) + d
        tl.store(at, acc.to(out.dtype.element_ty), (i < queries - start) & (d < D))


@triton.jit(do_not_specialize=[*RUNTIME_SIZES, *RUNTIME_STRIDES])
def _attention_kernel(
    q, k, v, own_k, own_v, out, kv_rows, key_lengths,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    own_k_row, own_k_token, own_k_head, own_v_row, own_v_token, own_v_head, out_row, out_token, out_head,
    tiles, heads, queries, keys, key_start, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_KV_ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, OWN_KEY: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Descriptors: a program takes every num_programs-th tile. Pointers: one (addresses that outlive a tile spill)."""
    if DESCRIPTORS:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
            _queries(
                tile, q, k, v, own_k, own_v, out, kv_rows, key_lengths,
                q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
                own_k_row, own_k_token, own_k_head, own_v_row, own_v_token, own_v_head, out_row, out_token, out_head,
                heads, queries, keys, key_start, scale, D, BLOCK_D, BLOCK_M, BLOCK_N, HAS_KV_ROWS, HAS_LENGTHS,
                OWN_KEY, DESCRIPTORS, PRECISION, VEC,
            )  # fmt: skip
    else:
        _queries(
            tl.program_id(0), q, k, v, own_k, own_v, out, kv_rows, key_lengths,
            q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
            own_k_row, own_k_token, own_k_head, own_v_row, own_v_token, own_v_head, out_row, out_token, out_head,
            heads, queries, keys, key_start, scale, D, BLOCK_D, BLOCK_M, BLOCK_N, HAS_KV_ROWS, HAS_LENGTHS,
            OWN_KEY, DESCRIPTORS, PRECISION, VEC,
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options; `majors`: compute capabilities where it spills nothing at head size 64 and 128."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False
    programs_per_sm: int = 1
    majors: tuple[int, ...] = (8, 9, 10, 12)

    @property
    def name(self) -> str:
        return f"{'tma-' if self.descriptors else ''}{self.block_m}x{self.block_n}"


HOPPER_AND_BLACKWELL = (9, 10)
SMALL_HEADS = (
    Config(128, 128, 8, 3, descriptors=True, majors=HOPPER_AND_BLACKWELL),
    Config(128, 64, 8, 3, descriptors=True, programs_per_sm=2, majors=HOPPER_AND_BLACKWELL),
    Config(64, 64, 4, 3, descriptors=True, programs_per_sm=3, majors=HOPPER_AND_BLACKWELL),
    Config(128, 64, 8, 3),
    Config(64, 64, 4, 3),
)
CONFIGS = {  # head size, rounded up to a power of 2 -> the first one is taken where nothing was measured
    16: SMALL_HEADS,
    32: SMALL_HEADS,
    64: SMALL_HEADS,
    128: (
        Config(128, 128, 8, 2, descriptors=True, majors=(9,)),
        Config(128, 64, 8, 3, descriptors=True, majors=HOPPER_AND_BLACKWELL),
        Config(64, 64, 4, 3, descriptors=True, majors=(9,)),
        Config(128, 32, 8, 3),
        Config(64, 32, 8, 2),
    ),
    256: (
        Config(64, 32, 8, 2, descriptors=True, majors=HOPPER_AND_BLACKWELL),
        Config(64, 32, 8, 2, majors=HOPPER_AND_BLACKWELL),
    ),
}
NAMES = tuple(dict.fromkeys(config.name for configs in CONFIGS.values() for config in configs))


def block_d(head_size: int) -> int:
    """What the kernel pads the head size to."""
    return max(16, triton.next_power_of_2(head_size))


def why_not(part: Part, name: str | None = None) -> str:
    """Why the kernel, or its config `name`, cannot run this part; empty if it can."""
    interpreted = triton.knobs.runtime.interpret
    if not part.q.is_cuda and not interpreted:
        return f"it needs CUDA tensors, these are on {part.q.device}"
    if part.q.dtype not in (torch.bfloat16, torch.float16) and not (interpreted and part.q.dtype == torch.float32):
        return f"it takes bfloat16 and float16, not {part.q.dtype}"
    configs = CONFIGS.get(block_d(part.q.shape[-1]), ())
    configs = tuple(config for config in configs if name in (None, config.name))
    if not configs:
        return f"it has no such config for head size {part.q.shape[-1]}"
    major = torch.cuda.get_device_capability(part.q.device)[0] if part.q.is_cuda else 9
    if not any(major in config.majors for config in configs):
        return f"it is not compiled for compute capability {major}.x at head size {part.q.shape[-1]}"
    if all(config.descriptors for config in configs) and not _fits_descriptors(part):
        return "tensor descriptors need 16-byte alignment, a head size that is a power of 2, and no own keys"
    return ""


def _fits_descriptors(part: Part) -> bool:
    size = part.q.element_size()
    return (
        part.own_k is None
        and part.q.shape[-1] == block_d(part.q.shape[-1])
        and all(
            x.data_ptr() % 16 == 0 and not any(stride * size % 16 for stride in x.stride()[:-1])
            for x in (part.q, part.k, part.v)
        )
    )


def attention(part: Part, name: str | None = None) -> Tensor:
    """[G, S, N, D]. `name`: a config's; None takes the first that can run."""
    configs = CONFIGS[block_d(part.q.shape[-1])]
    config = next(c for c in configs if name in (None, c.name) and not why_not(part, c.name))
    out = part.q.new_empty(part.q.shape)
    if out.numel():
        launch(part, config, out)
    return out


def launch(part: Part, config: Config, out: Tensor) -> None:
    """Run the kernel with `out` contiguous, not empty."""
    q, k, v = part.q, part.k, part.v
    rows, queries, heads, head_size = q.shape
    own_k, own_v = (q, q) if part.own_k is None or part.own_v is None else (part.own_k, part.own_v)
    tensors = (q, k, v, own_k, own_v, out)
    strides = [stride for x in tensors for stride in outer_strides(x, 3)]
    tiles = rows * heads * triton.cdiv(queries, config.block_m)
    padded = block_d(head_size)
    arguments: tuple = tensors
    if config.descriptors:
        described = [
            _descriptor(x, block, padded)
            for x, block in ((q, config.block_m), (k, config.block_n), (v, config.block_n), (out, config.block_m))
        ]
        arguments = (*described[:3], q, q, described[3])
        grid = min(tiles, config.programs_per_sm * _multiprocessors(q.device))
    else:
        grid = tiles
    with torch.cuda.device_of(q):
        _attention_kernel[(grid,)](
            *arguments,
            q if part.kv_rows is None else _index(part.kv_rows, q.device),
            q if part.key_lengths is None else part.key_lengths.contiguous(),
            *strides,
            tiles, heads, queries, k.shape[1], part.key_start, part.scale * LOG2_E,
            D=head_size, BLOCK_D=padded, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            HAS_KV_ROWS=part.kv_rows is not None, HAS_LENGTHS=part.key_lengths is not None,
            OWN_KEY=part.own_k is not None, DESCRIPTORS=config.descriptors,
            # the interpreter would multiply bfloat16 as integers
            PRECISION="ieee" if q.dtype == torch.float32 or triton.knobs.runtime.interpret else None,
            VEC=1 if any(step % 8 for step in strides) else 8,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def _descriptor(x: Tensor, block: int, block_d: int) -> TensorDescriptor:
    """Of [G, S, N, D] as [G, N, S, D]: a tile's sizes of 1 come first, so that it is a matrix without a copy."""
    x = x.transpose(1, 2)
    strides = [x.shape[-1] if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, block, block_d])


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache  # never dropped: a captured CUDA graph reads them
def _index(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
