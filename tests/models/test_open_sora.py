"""Open-Sora through a ModelSpec that its user registers: a class without return_dict and config, packed prompts."""

import pytest
import torch
from models.case import relative_error
from models.families import stdit

from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.layout import join, select
from stg_engine.models import spec_of

PAPER = STGConfig(  # arXiv 2411.18664, appendix A1.3: layer 12 of 28, STG-A, both terms of Eq. 20
    layers=(11,), scale=2.0, mode="attention", axis="spatial", extra_skips=(Skip((11,), 2.0, "attention", "temporal"),)
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_published_guidance():
    model = stdit.model(torch.float32, depth=28)
    shared, cond, uncond = stdit.inputs(2, torch.float32)
    c, u = model(**shared, **cond), model(**shared, **uncond)
    expected = u + 7 * (c - u)
    for skip in PAPER.skips:
        with stdit.skipped(model, skip):
            expected += 2 * (c - model(**shared, **cond))
    with Denoiser(model, PAPER) as denoiser:
        guided = denoiser(shared, cond, uncond, guidance_scale=7.0)
        plan = denoiser.plans()
    assert guided.shape == c.shape
    assert relative_error(guided, expected) < 1e-5
    assert plan.forks["skip"].block == 22
    assert plan.forks["skip2"].block == 23
    assert plan.block_rows == 4 * 56 - 22 - 23


def test_a_step_without_skips_is_the_model_itself():
    model = stdit.model(torch.float32)
    shared, cond, uncond = stdit.inputs(2, torch.float32)
    with Denoiser(model, STGConfig(layers=(1,), axis="spatial", scale=0.0)) as denoiser:
        guided = denoiser(shared, cond, uncond, guidance_scale=7.0)
    c, u = model(**shared, **cond), model(**shared, **uncond)
    assert relative_error(guided, u + 7 * (c - u)) < 1e-5


@pytest.mark.parametrize("max_rows", [None, 1, 2])
def test_texts_stay_with_their_rows(max_rows):
    """Every block gets one packed text, and one length, per row that the plan gives it."""
    model = stdit.model(torch.float32)
    seen = []
    for block in model.spatial_blocks:

        def spied(x, y, t, mask=None, *args, inner=block.forward, **kwargs):
            seen.append((len(x), list(mask), y.shape[1]))
            return inner(x, y, t, mask, *args, **kwargs)

        block.forward = spied
    with Denoiser(model, STGConfig(layers=(2,), axis="temporal"), max_rows=max_rows) as denoiser:
        denoiser.branches(*stdit.inputs(2, torch.float32))
    assert all(rows == len(lengths) and sum(lengths) == size for rows, lengths, size in seen)
    uncond, cond = [2, 4], [3, 5]
    assert [length for _, lengths, _ in seen for length in lengths] == [*uncond, *cond] * 3 + [*uncond, *cond, *cond]


def test_blocks_are_found_without_a_config():
    model = stdit.model(torch.float32)
    assert spec_of(model) is stdit.OPEN_SORA
    with pytest.raises(ValueError, match="no preset was published for Open-Sora"):
        Denoiser(model)
    with pytest.raises(ValueError, match="factorised"):
        Denoiser(model, STGConfig(layers=(1,), mode="attention"))


@pytest.mark.parametrize("rows", [(1, 2), (2, 0)])
def test_rows_keep_the_order_of_their_memory(rows):
    x = torch.randn(3, 5, 7, 2).permute(0, 3, 1, 2)
    chosen = select(x, rows, 3)
    assert torch.equal(chosen, x[list(rows)])
    assert chosen.stride() == x.stride()
    joined = join([x[:1], x[1:]])
    assert torch.equal(joined, x)
    assert joined.stride() == x.stride()
