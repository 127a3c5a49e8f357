"""Latte, Allegro, Sana-Video: pipelines that read their guidance scale before the loop."""

import pytest
import torch
from models.pipelines import allegro, latte, sana_video

import stg_engine
from stg_engine import STGConfig

CFG_FOR_THE_LOOP = [latte.CASES[0], allegro.CASES[0]]
CHANGES = [*((case, scale) for case in CFG_FOR_THE_LOOP for scale in (0.0, 3.0)), (sana_video.CASES[0], 3.0)]


@pytest.mark.parametrize(("case", "scale"), CHANGES, ids=str)
def test_a_callback_changes_no_scale(case, scale):
    pipe = case.build()

    def change(pipe, index, timestep, tensors):
        pipe._guidance_scale = scale
        return tensors

    plain = case.latents(pipe)
    assert torch.equal(case.latents(pipe, callback_on_step_end=change), plain)
    with stg_engine.attach(pipe, STGConfig(layers=(1,), axis=case.case.axes[0])):
        latents = case.latents(pipe)
        assert torch.equal(case.latents(pipe, callback_on_step_end=change), latents)
    assert not torch.equal(latents, plain)


def test_allegro_stays_in_half_precision():
    """The scheduler returns latents in the dtype of the prediction, which the model has to take in the next step."""
    (case,) = allegro.CASES
    pipe = case.build(torch.bfloat16)
    plain = case.latents(pipe)
    with stg_engine.attach(pipe, STGConfig(layers=(1,))):
        latents = case.latents(pipe)
    assert latents.dtype == plain.dtype == torch.bfloat16
    assert latents.isfinite().all()
    assert not torch.equal(latents, plain)
