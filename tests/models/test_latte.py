"""Latte: what runs once per prompt, once per row that differs, and row by row."""

import pytest
import torch
from models.families import latte

from stg_engine import Denoiser, STGConfig

FRAMES, VIDEOS = 3, 2
LAST = STGConfig(layers=(3,), mode="attention", axis="temporal")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def transformer():
    return latte.model(torch.float32)


def record(module):
    """Branches' worth of rows that each call gets, once a Denoiser's hooks are above."""
    rows = []

    def spied(*args, inner=module.forward, **kwargs):
        rows.append(len(args[0] if args else kwargs["hidden_states"]) / VIDEOS)
        return inner(*args, **kwargs)

    module.forward = spied
    return rows


def steps(transformer, count, **options):
    """Every step has new latents and the same prompt."""
    shared, cond, uncond = latte.inputs(VIDEOS, torch.float32)
    with Denoiser(transformer, LAST, kernels="off", **options) as denoiser:
        for step in range(count):
            denoiser.branches({**shared, "hidden_states": shared["hidden_states"] + step}, cond, uncond)


def test_text_is_projected_once_per_prompt(transformer):
    caption = record(transformer.caption_projection)
    keys = [record(transformer.transformer_blocks[i].attn2.to_k) for i in (0, 3)]
    steps(transformer, 3)
    assert caption == [3]
    assert keys == [[2 * FRAMES]] * 2  # the spatial blocks, up to the last temporal one, have no rows of the skip


def test_self_attention_is_shared_until_the_text_is_read(transformer):
    attended = [record(block.attn1) for block in transformer.transformer_blocks]
    steps(transformer, 1)
    assert attended == [[FRAMES], *[[2 * FRAMES]] * 3]


@pytest.mark.parametrize(("path", "rows"), [("pos_embed", 1), ("norm_out", 3), ("proj_out", 3)])
def test_rows_outside_the_blocks(transformer, path, rows):
    seen = record(transformer.get_submodule(path))
    steps(transformer, 1)
    steps(transformer, 1, execution="serial")
    assert seen == [rows * FRAMES] + [FRAMES / VIDEOS] * (rows * VIDEOS)
