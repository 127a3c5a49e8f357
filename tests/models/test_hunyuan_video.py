"""What is special in HunyuanVideo: two lists of blocks, and much work outside them."""

import pytest
import torch
from models.families import hunyuan_video, hunyuan_video_1_5

from stg_engine import Denoiser, STGConfig
from stg_engine.hooks import hook_of
from stg_engine.models import spec_of

VIDEOS, STEPS = 2, 2


def rows_of_calls(case, modules, **settings):
    """{module: rows of each of its calls} in STEPS guided forwards of uncond, cond and skip."""
    model, calls = case.model(torch.float32), {name: [] for name in modules}
    shared, cond, uncond = case.inputs(VIDEOS, torch.float32)
    with torch.no_grad(), Denoiser(model, STGConfig(layers=(1,)), kernels="off", **settings) as denoiser:
        for name in modules:
            below = hook_of(model.get_submodule(name)).fn_ref

            def spy(*args, name=name, inner=below.original_forward, **kwargs):
                calls[name].append(len(args[0]))
                return inner(*args, **kwargs)

            below.original_forward = spy
        for _ in range(STEPS):
            denoiser.branches(shared, cond, uncond)
    return calls


@pytest.mark.parametrize(
    ("case", "once", "once_per_prompt", "per_row"),
    [
        (case, ["x_embedder"], [], ["time_text_embed", "context_embedder", "norm_out", "proj_out"])
        for case in hunyuan_video.CASES
    ]
    + [
        (
            case,
            ["x_embedder", "time_embed", "image_embedder"],
            ["context_embedder_2"],
            ["context_embedder", "norm_out", "proj_out"],
        )
        for case in hunyuan_video_1_5.CASES
    ],
    ids=str,
)
def test_work_outside_the_blocks(case, once, once_per_prompt, per_row):
    modules = once + once_per_prompt + per_row
    together, apart = rows_of_calls(case, modules), rows_of_calls(case, modules, execution="serial")
    for names, rows, steps in ((once, VIDEOS, STEPS), (once_per_prompt, 3 * VIDEOS, 1), (per_row, 3 * VIDEOS, STEPS)):
        for name in names:
            assert together[name] == [rows] * steps, name
            assert apart[name] == [1] * rows * steps, name


def test_layers_are_numbered_over_dual_and_single_blocks():
    model = hunyuan_video.model(torch.float32, num_layers=1, num_single_layers=3)
    spec = spec_of(model)
    assert spec.num_layers(model.config) == 4
    assert spec.block_list(model) == [*model.transformer_blocks, *model.single_transformer_blocks]
