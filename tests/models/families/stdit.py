"""Open-Sora 1.2's STDiT3, which is not in diffusers: a small model of that structure, and its ModelSpec, as users write
one for a model class that they have.

Structure, after Open-Sora's report 1.2 and the STDiT3 it publishes: T frames of S patches each as one sequence
[B, T * S, C]; every layer a spatial block (attention inside a frame) and a temporal one (attention across frames), both
with cross-attention to the text. All prompts are packed into one sequence without padding, [1, sum of lengths, C], and
the blocks get the lengths as a list. Frames that `x_mask` leaves out are conditioning and get the modulation of
timestep 0. Rotary embeddings are left out here.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from models.case import Case, block_inputs_returned, randomise, replaced_forwards
from torch import nn

from stg_engine.models import ModelSpec, register

WIDTH, HEADS, TEXT, FREQUENCIES = 8, 2, 16, 64


def modulated(x, shift, scale):
    return x * (1 + scale) + shift


def of_frames(x_mask, x, conditioning, T):
    """x in the frames that are denoised, `conditioning` in the others: [B, T * S, C]."""
    if x_mask is None:
        return x
    x, conditioning = (each.unflatten(1, (T, -1)) for each in (x, conditioning))
    return torch.where(x_mask[:, :, None, None], x, conditioning).flatten(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.RMSNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_linear, self.kv_linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, cond, mask=None):
        rows, tokens, _ = x.shape
        q = self.q_linear(x).view(1, rows * tokens, HEADS, -1).transpose(1, 2)
        k, v = self.kv_linear(cond).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        own = torch.block_diag(*(torch.ones(tokens, length) for length in mask)).bool()
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=own)
        return self.proj(x.transpose(1, 2).reshape(rows, tokens, WIDTH))


class Block(nn.Module):
    def __init__(self, temporal):
        super().__init__()
        self.temporal = temporal
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn, self.cross_attn = Attention(), CrossAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU("tanh"), nn.Linear(2 * WIDTH, WIDTH))
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):
        def six(t):
            return (self.scale_shift_table + t.unflatten(1, (6, -1))).chunk(6, dim=1)

        now, zero = six(t), six(t if x_mask is None else t0)

        def modulate(x, i):
            return of_frames(x_mask, modulated(x, now[i], now[i + 1]), modulated(x, zero[i], zero[i + 1]), T)

        def gate(x, i):
            return of_frames(x_mask, now[i] * x, zero[i] * x, T)

        normed = modulate(self.norm1(x), 0).unflatten(1, (T, S))
        normed = normed.transpose(1, 2) if self.temporal else normed
        attended = self.attn(normed.flatten(0, 1)).unflatten(0, normed.shape[:2])
        attended = attended.transpose(1, 2) if self.temporal else attended
        x = x + gate(attended.flatten(1, 2), 2)
        x = x + self.cross_attn(x, y, mask)
        return x + gate(self.mlp(modulate(self.norm2(x), 3)), 5)


class Embedder(nn.Module):
    """Numbers, of which a row may have several -> their sinusoids through `mlp`."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, values, rows):
        values = values.repeat(rows // len(values), *[1] * (values.ndim - 1)).float().flatten()
        angles = values[:, None] * 0.1 ** torch.arange(FREQUENCIES // 2)
        frequencies = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(frequencies.to(self.mlp[0].weight.dtype)).unflatten(0, (rows, -1)).flatten(1)


class TextEmbedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.y_proj = nn.Linear(TEXT, WIDTH)

    def forward(self, y, train):
        return self.y_proj(y)


class FinalLayer(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.linear = nn.Linear(WIDTH, channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x, t, x_mask=None, t0=None, T=None, S=None):
        x = self.norm(x)
        now, zero = ((self.scale_shift_table + t[:, None]).chunk(2, 1) for t in (t, t if x_mask is None else t0))
        return self.linear(of_frames(x_mask, modulated(x, *now), modulated(x, *zero), T))


class STDiT3(nn.Module):
    def __init__(self, depth=4, channels=4):
        super().__init__()
        self.x_embedder = nn.Conv3d(channels, WIDTH, (1, 2, 2), stride=(1, 2, 2))
        self.t_embedder, self.fps_embedder, self.y_embedder = Embedder(), Embedder(), TextEmbedder()
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.spatial_blocks = nn.ModuleList(Block(temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(Block(temporal=True) for _ in range(depth))
        self.final_layer = FinalLayer(2 * channels * 4)

    def encode_text(self, y, mask):
        y = self.y_embedder(y, self.training).squeeze(1)
        if mask is None:
            return y.reshape(1, -1, WIDTH), [y.shape[1]] * len(y)
        return y[mask != 0].view(1, -1, WIDTH), mask.sum(1).tolist()

    def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None, **kwargs):
        B, _, T, H, W = x.shape
        fps = self.fps_embedder(fps[:, None], B)
        t = self.t_embedder(timestep, B) + fps
        t_mlp, t0, t0_mlp = self.t_block(t), None, None
        if x_mask is not None:
            t0 = self.t_embedder(torch.zeros_like(timestep), B) + fps
            t0_mlp = self.t_block(t0)
        y, y_lens = self.encode_text(y, mask)
        x = self.x_embedder(x).flatten(3).permute(0, 2, 3, 1)
        S, scale = x.shape[2], (height[0].item() * width[0].item()) ** 0.5 / 16
        places = torch.arange(S * WIDTH).view(S, WIDTH) / scale
        x = (x + places.sin().to(x.dtype)).flatten(1, 2)
        for spatial_block, temporal_block in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial_block(x, y, t_mlp, y_lens, x_mask, t0_mlp, T, S)
            x = temporal_block(x, y, t_mlp, y_lens, x_mask, t0_mlp, T, S)
        x = self.final_layer(x, t, x_mask, t0, T, S)
        x = x.view(B, T, H // 2, W // 2, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(B, -1, T, H, W).float()


def values_of(attention, arguments):
    """The attention map is the identity: the projected V."""
    return attention.proj(attention.qkv(arguments["x"]).chunk(3, dim=-1)[2])


def packed_text(arguments, rows, total):
    """Text [1, sum(mask), C] of the rows: `mask` holds the lengths."""
    lengths = arguments["mask"]
    texts = arguments["y"].split(lengths, dim=1)
    return {"y": torch.cat([texts[row] for row in rows], dim=1), "mask": [lengths[row] for row in rows]}


OPEN_SORA = register(
    ModelSpec(
        family="Open-Sora",
        transformer="STDiT3",
        blocks=("spatial_blocks.*",),
        temporal_blocks=("temporal_blocks.*",),
        count_layers=lambda config: config["depth"],
        latents=("x", "timestep", "x_mask", "fps", "height", "width"),
        prompt=("y", "mask"),
        streams=("x",),
        block_rows=("t", "x_mask", "t0"),
        select_rows=packed_text,
        self_attention=("attn",),
        attention_rows=("x",),
        attention_skip=values_of,
        shares_attention=True,
        once_per_step=dict.fromkeys(("x_embedder", "t_embedder.mlp", "fps_embedder.mlp", "t_block"), (0,)),
        per_row={"y_embedder": (0,), "final_layer": (0, 1, 2, 3)},
        waits_in="forward",  # for sizes, and for the lengths of prompts
    )
)


def model(dtype, depth=4):
    torch.manual_seed(0)
    return randomise(STDiT3(depth)).to(dtype)


def inputs(videos, dtype):
    """Three frames, the first of the second video conditioning; every prompt of another length."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x_mask = torch.ones(videos, 3, dtype=torch.bool)
    x_mask[1:2, 0] = False
    numbers = {name: torch.tensor([value] * videos) for name, value in (("fps", 24.0), ("height", 64), ("width", 48))}
    shared = {"x": normal(videos, 4, 3, 4, 8), "timestep": torch.tensor([70.0] * videos), "x_mask": x_mask, **numbers}
    lengths = torch.tensor([[3, 5, 1], [2, 4, 5]])[:, :videos]
    cond, uncond = (
        {"y": normal(videos, 1, 6, TEXT), "mask": (torch.arange(6) < row[:, None]).long()} for row in lengths
    )
    return shared, cond, uncond


def without_masks(videos, dtype):
    shared, cond, uncond = inputs(videos, dtype)
    return {**shared, "x_mask": None}, {**cond, "mask": None}, {**uncond, "mask": None}


def values_out(attention, x):
    """STG-A: the attention map is the identity, arXiv 2411.18664 Eq. 17, in one of the factorised attentions."""
    return attention.proj(attention.qkv(x)[..., 2 * WIDTH :])


@contextmanager
def skipped(transformer, skip):
    lists = {"spatial": transformer.spatial_blocks, "temporal": transformer.temporal_blocks}
    blocks = [blocks[i] for axis, blocks in lists.items() if skip.axis in (None, axis) for i in skip.layers]
    if skip.mode == "residual":
        with block_inputs_returned(blocks, ("x",)):
            yield
    else:
        with replaced_forwards([block.attn for block in blocks], values_out):
            yield


CASES = [
    Case("Open-Sora", model, inputs, skipped, axes=("spatial", "temporal"), call={}),
    Case("Open-Sora without masks", model, without_masks, skipped, axes=("spatial", "temporal"), call={}),
]
