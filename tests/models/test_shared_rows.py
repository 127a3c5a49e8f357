"""Allegro, Sana-Video, Cosmos: how many rows of two videos each module gets, in the first step and in the second."""

import pytest
import torch
from models.families import allegro, cosmos, sana_video

from stg_engine import Denoiser, STGConfig

IN_ALL = {  # layer 2 of 4 is skipped: cond and uncond before, all three behind
    "transformer_blocks.0.attn1.to_q": [2, 2],  # uncond equals cond up to the first prompt
    "transformer_blocks.0.ff": [4, 4],
    "transformer_blocks.3.attn2.to_k": [6, 0],
    "norm_out": [6, 6],
    "proj_out": [6, 6],
}
CASES = [
    (allegro.CASES[0], {"pos_embed": [2, 2], "adaln_single": [2, 2], "caption_projection": [6, 0]}),
    (sana_video.CASES[0], {"patch_embedding": [2, 2], "time_embed": [2, 2], "caption_norm": [6, 0]}),
    (cosmos.CASES[0], {"patch_embed": [2, 2], "learnable_pos_embed": [2, 2], "time_embed.t_embedder": [2, 2]}),
    (cosmos.CASES[1], {"crossattn_proj": [6, 0], "time_embed.t_embedder": [2, 2]}),
]


def entries(model, case, config, paths, **options):
    """Per path, sizes of dim 0 of its first argument: one list per step, one entry per call."""
    calls = {path: [] for path in paths}
    shared, cond, uncond = case.inputs(2, torch.float32)
    for path in paths:
        module = model.get_submodule(path)

        def noted(*args, inner=module.forward, path=path, **kwargs):
            calls[path][-1].append(len(next(iter((*args, *kwargs.values())))))
            return inner(*args, **kwargs)

        module.forward = noted
    with torch.no_grad(), Denoiser(model, config, kernels="off", **options) as denoiser:
        for _ in range(2):
            for steps in calls.values():
                steps.append([])
            denoiser.branches(shared, cond, uncond)
    return calls


@pytest.mark.parametrize(("case", "outside"), CASES, ids=str)
def test_rows_of_each_step(case, outside):
    model, rows = case.model(torch.float32), {**IN_ALL, **outside}
    config = STGConfig(layers=(2,))
    calls = entries(model, case, config, rows)
    alone = entries(case.model(torch.float32), case, config, rows, execution="serial")
    for path, (first, second) in rows.items():
        row = max(alone[path][0])  # entries of one row
        assert [sum(step) for step in calls[path]] == [first * row, second * row], path
        assert alone[path] == [[row] * first, [row] * second], path
