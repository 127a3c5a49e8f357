"""The combination's limits and equations; the formulas as whole are checked against `reference.three_passes`."""

import pytest
import torch

from stg_engine.guidance import cfg_star_alpha, combine, largest_difference, rescale_factor

SHAPE = (2, 5, 3)


@pytest.fixture
def predictions():
    return torch.randn(4, *SHAPE).unbind(0)


def test_scale_0_and_no_uncond_is_cond(predictions):
    c, u, p, _ = predictions
    assert torch.equal(combine(c, None, []), c)
    assert torch.equal(combine(c, None, [(p, 0.0)]), c)
    assert torch.allclose(combine(c, u, [], guidance_scale=1.0), c, atol=1e-6)


def test_equal_predictions_stay_whatever_the_scales(predictions):
    c = predictions[0]
    assert torch.equal(combine(c, c, [(c, 7.0), (c, 3.0)], guidance_scale=8.0), c)


def test_weights_sum_to_one(predictions):
    """A constant added to every prediction is added to the result: velocity, eps and x0 space agree."""
    c, u, p, q = (prediction.double() for prediction in predictions)
    arguments = {"guidance_scale": 5.0, "arithmetic": "model"}
    moved = combine(c + 3, u + 3, [(p + 3, 1.5), (q + 3, 0.5)], **arguments)
    assert torch.allclose(moved, combine(c, u, [(p, 1.5), (q, 0.5)], **arguments) + 3, atol=1e-5)


def test_rescale_1_gives_the_std_of_cond(predictions):
    c, u, p, _ = predictions
    guided = combine(c, u, [(p, 2.0)], guidance_scale=6.0, rescale=1.0)
    assert torch.allclose(guided.flatten(1).std(1), c.flatten(1).std(1))
    guided = combine(c, u, [(p, 2.0)], guidance_scale=6.0, rescale=1.0, rescale_over="batch")
    assert torch.allclose(guided.std(), c.std())
    assert rescale_factor(c, guided, 0.0, over="sample").eq(1).all()


def test_one_video_of_a_batch_does_not_see_the_others(predictions):
    c, u, p, _ = predictions
    arguments = {"guidance_scale": 6.0, "rescale": 0.7, "cfg_star": True}
    both = combine(c, u, [(p, 2.0)], **arguments)
    assert torch.equal(both[:1], combine(c[:1], u[:1], [(p[:1], 2.0)], **arguments))


def test_cfg_star_takes_the_part_of_cond_along_uncond(predictions):
    c, u, _, _ = predictions
    rest = c - cfg_star_alpha(c, u) * u
    assert (rest * u).sum((1, 2)).abs().max() < 1e-4


def test_arithmetic(predictions):
    c, u, p, _ = (prediction.bfloat16() for prediction in predictions)
    wide = combine(c, u, [(p, 4.0)], guidance_scale=8.0)
    narrow = combine(c, u, [(p, 4.0)], guidance_scale=8.0, arithmetic="model")
    assert wide.dtype == narrow.dtype == torch.float32
    assert torch.equal(narrow, narrow.bfloat16().float())
    assert not torch.equal(wide, wide.bfloat16().float())
    exact = combine(c.double(), u.double(), [(p.double(), 4.0)], guidance_scale=8.0, arithmetic="model")
    assert (wide - exact).norm() < (narrow - exact).norm() / 100


def test_largest_difference(predictions):
    c, _, p, _ = predictions
    assert largest_difference(c, p) == (c - p).abs().max()
    assert largest_difference(c, c) == 0


def test_cfg_star_of_large_float16_values():
    """|u|^2 overflows float16; the sums are float32."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (300 * torch.randn(1, 4, 64, generator=generator).half() for _ in range(2))
    actual = combine(cond, uncond, [], guidance_scale=2.0, cfg_star=True, arithmetic="model")
    alpha = (cond.double() * uncond.double()).sum() / uncond.double().square().sum()
    scaled = alpha.half() * uncond
    assert torch.equal(actual, (scaled + 2.0 * (cond - scaled)).float())
