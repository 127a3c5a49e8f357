"""attach() on LTX-2 pipelines: their own passes as one forward per step, and a config's in their place."""

from functools import wraps

import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput
from models import ltx2_pipes
from models.case import relative_error
from models.families import ltx2

import stg_engine
from stg_engine import Skip, STGConfig
from stg_engine.hooks import hook_of

FP32_RELATIVE = 2e-5
"""Of latents: 2e-6 of a branch, times the scales, over three steps."""
OFF = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}
NO_STG = {"stg_scale": 0.0, "audio_stg_scale": 0.0}
NO_MODALITY = {"modality_scale": 1.0, "audio_modality_scale": 1.0}


@pytest.fixture
def pipe():
    return ltx2_pipes.build("text", "LTX-2.3")


def close(actual, expected):
    return all(relative_error(a, b) <= FP32_RELATIVE for a, b in zip(actual, expected, strict=True))


def equal(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def record(engine):
    """Rows of every block of every forward: grows by one list per forward below the engine's hook."""
    forwards = []
    takeover = hook_of(engine.denoiser.transformer, "stg_engine_pipeline").fn_ref

    def forward(*args, inner=takeover.original_forward, **kwargs):
        forwards.append([])
        return inner(*args, **kwargs)

    takeover.original_forward = forward
    for block in engine.denoiser.blocks:
        below = hook_of(block).fn_ref

        def run(inner=below.original_forward, **arguments):
            forwards[-1].append(len(arguments["hidden_states"]))
            return inner(**arguments)

        below.original_forward = run
    return forwards


@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, [3, 3, 4, 4]),
        (OFF, [2, 2, 3, 3]),
        (NO_MODALITY, [2, 2, 3, 3]),
        (NO_MODALITY | OFF, [1, 1, 2, 2]),
        (NO_STG, [3, 3, 3, 3]),
        (NO_STG | OFF, [2, 2, 2, 2]),
        ({"spatio_temporal_guidance_blocks": [3, 1, 90]}, [3, 4, 4, 4]),
    ],
    ids=["all", "no_cfg", "no_modality", "stg_alone", "no_stg", "modality_alone", "blocks"],
)
def test_the_pipelines_own_passes_are_one_forward(pipe, changes, rows, videos):
    expected = ltx2_pipes.latents(pipe, videos, **changes)
    has_stg = "stg_scale" not in changes
    with stg_engine.attach(pipe) as engine:
        forwards = record(engine)
        actual = ltx2_pipes.latents(pipe, videos, **changes)
        report = engine.report()
    assert close(actual, expected)
    if has_stg:  # the first step does not know the blocks before its STG pass
        assert [len(forward) for forward in forwards] == [4] * 4
        assert forwards.pop(1) == [videos] * 4
        assert max(forwards.pop(0)) == (max(rows) - 1) * videos
    assert forwards == [[count * videos for count in rows]] * (2 if has_stg else 3)
    assert [len(names) for names in report.plan.rows] == rows
    assert report.steps == 3
    assert set(report.differences) == set(["skip"] * has_stg + ["modality"] * ("modality_scale" not in changes))
    assert equal(ltx2_pipes.latents(pipe, videos, **changes), expected), "detach left something"


@pytest.mark.parametrize("variant", ["LTX-2", "LTX-2.3"])
@pytest.mark.parametrize("kind", ltx2_pipes.KINDS)
def test_every_pipeline_and_model(kind, variant):
    pipe = ltx2_pipes.build(kind, variant, perturbed_attn=True)
    expected = ltx2_pipes.latents(pipe, 2)
    with stg_engine.attach(pipe) as engine:
        forwards = record(engine)
        assert close(ltx2_pipes.latents(pipe, 2), expected)
        assert close(ltx2_pipes.latents(pipe, 2), expected)
    assert len(forwards) == 2 * 4
    without = ltx2_pipes.latents(pipe, 2, **NO_STG)
    assert not close(without, expected)
    assert not close(ltx2_pipes.latents(pipe, 2, **NO_MODALITY), expected)


def test_serial_is_bitwise_the_pipeline_with_one_video_and_no_cfg(pipe):
    """Each of its passes has one row then, so nothing is summed in another order."""
    expected = ltx2_pipes.latents(pipe, **OFF)
    with stg_engine.attach(pipe, execution="serial", kernels="off"):
        assert equal(ltx2_pipes.latents(pipe, **OFF), expected)


def test_guidance_off_is_the_plain_pipeline(pipe):
    changes = OFF | NO_STG | NO_MODALITY
    expected = ltx2_pipes.latents(pipe, **changes)
    with stg_engine.attach(pipe) as engine:
        assert equal(ltx2_pipes.latents(pipe, **changes), expected)
        assert (engine.report().steps, engine.report().guided_steps) == (3, 0)


def test_stg_that_diffusers_drops_is_dropped_and_said_so():
    pipe = ltx2_pipes.build("text", "LTX-2")
    expected = ltx2_pipes.latents(pipe)
    with stg_engine.attach(pipe) as engine:
        forwards = record(engine)
        with pytest.warns(UserWarning, match="branch 'skip' equals cond"):
            actual = ltx2_pipes.latents(pipe)
    assert close(actual, expected)
    assert len(forwards) == 4
    assert max(map(max, forwards)) == 3


def test_a_callback_that_changes_scales(pipe):
    def change(pipe, index, timestep, tensors):
        if index == 0:
            pipe._modality_scale = pipe._audio_modality_scale = 1.0
            pipe._guidance_scale = 2.0
        if index == 1:
            pipe._stg_scale = pipe._audio_stg_scale = 0.0
        return {"latents": tensors["latents"] * 0.9}

    expected = ltx2_pipes.latents(pipe, callback_on_step_end=change)
    with stg_engine.attach(pipe) as engine:
        forwards = record(engine)
        assert close(ltx2_pipes.latents(pipe, callback_on_step_end=change), expected)
    assert [max(rows) for rows in forwards] == [3, 1, 3, 2]


def test_interrupt(pipe):
    def interrupt(pipe, index, timestep, tensors):
        pipe._interrupt = index == 1
        return {}

    whole = ltx2_pipes.latents(pipe)
    expected = ltx2_pipes.latents(pipe, callback_on_step_end=interrupt)
    with stg_engine.attach(pipe) as engine:
        assert close(ltx2_pipes.latents(pipe, callback_on_step_end=interrupt), expected)
        assert engine.report().steps == 2
        assert close(ltx2_pipes.latents(pipe), whole)


def test_an_exception_in_a_step_leaves_the_pipeline_usable(pipe):
    def stop(pipe, index, timestep, tensors):
        raise KeyboardInterrupt

    with stg_engine.attach(pipe):
        expected = ltx2_pipes.latents(pipe)
        with pytest.raises(KeyboardInterrupt):
            ltx2_pipes.latents(pipe, callback_on_step_end=stop)
        assert equal(ltx2_pipes.latents(pipe), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda arguments: {"hidden_states": arguments["hidden_states"] * 0.5},
        lambda arguments: {"audio_encoder_hidden_states": -arguments["audio_encoder_hidden_states"]},
        lambda arguments: {"fps": 12.0, "video_coords": None},
        lambda arguments: {"isolate_modalities": True},
        lambda arguments: {"perturbation_mask": torch.ones(1)},
    ],
    ids=["latents", "prompt", "numbers", "both", "mask"],
)
def test_a_pass_of_another_kind_runs_as_it_is(pipe, change):
    def edit(model, args, arguments):
        if arguments["isolate_modalities"] or arguments["spatio_temporal_guidance_blocks"]:
            return args, arguments | change(arguments)
        return None

    plain = ltx2_pipes.latents(pipe)
    pipe.transformer.register_forward_pre_hook(edit, with_kwargs=True)
    expected = ltx2_pipes.latents(pipe)
    assert not close(plain, expected)
    with stg_engine.attach(pipe):
        assert close(ltx2_pipes.latents(pipe), expected)


def test_blocks_that_change_from_step_to_step(pipe):
    calls = []

    def edit(model, args, arguments):
        if arguments["spatio_temporal_guidance_blocks"]:
            calls.append(arguments)
            return args, arguments | {"spatio_temporal_guidance_blocks": [2] if len(calls) % 3 else [1]}
        return None

    pipe.transformer.register_forward_pre_hook(edit, with_kwargs=True)
    expected = ltx2_pipes.latents(pipe)
    with stg_engine.attach(pipe) as engine:
        forwards = record(engine)
        assert close(ltx2_pipes.latents(pipe), expected)
    assert len(forwards) == 5  # the STG pass on its own in the first and in the last step


def test_more_calls_than_passes_are_an_error(pipe):
    with stg_engine.attach(pipe):
        inner = pipe.transformer.forward

        @wraps(inner)
        def twice(**arguments):
            inner(**arguments)
            return inner(**arguments)

        pipe.transformer.forward = twice
        with pytest.raises(RuntimeError, match="called more often than 3 times in a step of the LTX2Pipeline"):
            ltx2_pipes.latents(pipe)
        pipe.transformer.forward = inner


def test_the_model_may_return_its_own_output_class(pipe):
    kinds = set()

    def ask(model, args, arguments):
        return args, arguments | {"return_dict": True}

    def unpack(model, args, output):
        kinds.add(type(output))
        return output.sample, output.audio_sample

    expected = ltx2_pipes.latents(pipe)
    pipe.transformer.register_forward_pre_hook(ask, with_kwargs=True)
    pipe.transformer.register_forward_hook(unpack)
    with stg_engine.attach(pipe):
        assert close(ltx2_pipes.latents(pipe), expected)
    assert kinds == {AudioVisualModelOutput}


def by_hand(pipe, config, **changes):
    """The pipeline's latents with the config's weak passes in place of its own, each a call of its own."""
    skips, inner, case = config.skips, pipe.transformer.forward, ltx2.CASES[1]

    @wraps(inner)
    def forward(**arguments):
        if not arguments["spatio_temporal_guidance_blocks"]:
            return inner(**arguments)
        arguments["spatio_temporal_guidance_blocks"] = None
        total, outputs = sum(skip.scale for skip in skips), []
        for skip in skips:
            with case.skipped(pipe.transformer, skip):
                outputs.append([rows * (skip.scale / total) for rows in inner(**arguments)])
        return [sum(parts) for parts in zip(*outputs, strict=True)]

    scale = sum(skip.scale for skip in skips)
    pipe.transformer.forward = forward
    result = ltx2_pipes.latents(pipe, **{"stg_scale": scale, "audio_stg_scale": scale} | changes)
    del pipe.transformer.forward
    return result


@pytest.mark.parametrize("changes", [{}, OFF, NO_STG | {"spatio_temporal_guidance_blocks": None}, NO_MODALITY])
@pytest.mark.parametrize(
    "config",
    [
        STGConfig(layers=(1,), scale=1.5),
        STGConfig(layers=(2, 3), mode="attention", scale=0.5),
        STGConfig(layers=(1,), scale=0.5, extra_skips=(Skip((2,), 1.5, "attention"),)),
        STGConfig(layers=(1,), modality_scale=2.0),
    ],
    ids=["residual", "attention", "two", "modality"],
)
def test_a_config_takes_the_place_of_the_pipelines_passes(pipe, config, changes):
    mu = config.modality_scale
    kept = {name: value for name, value in changes.items() if "stg" not in name and "blocks" not in name}
    kept |= {} if mu == 1 else {"modality_scale": mu, "audio_modality_scale": mu}
    expected = by_hand(pipe, config, **kept)
    with stg_engine.attach(pipe, config) as engine:
        forwards = record(engine)
        assert close(ltx2_pipes.latents(pipe, **changes), expected)
        assert len(forwards) == 3
        report = engine.report()
    has_modality = mu != 1 or changes is not NO_MODALITY
    assert set(report.differences) == {"skip", *["skip2"] * len(config.extra_skips), *["modality"] * has_modality}
    assert forwards == [[len(names) for names in report.plan.rows]] * 3


@pytest.mark.parametrize("modality_scale", [1.0, 2.0])
def test_a_window_is_plain_outside(pipe, modality_scale):
    """The pipeline asks for its weak passes in every step; cond answers where they are off: s (c - c) = 0."""

    def states(**changes):
        found = []
        ltx2_pipes.latents(pipe, callback_on_step_end=lambda *args: found.append(args[3]["latents"]) or {}, **changes)
        return found

    plain = states(**NO_MODALITY, **NO_STG)
    config = STGConfig(layers=(1,), scale=1.5, start=0.3, stop=0.6, modality_scale=modality_scale)
    with stg_engine.attach(pipe, config) as engine:
        forwards = record(engine)
        window = states(**NO_MODALITY)
        assert engine.report().guided_steps == 1
    assert [max(rows) for rows in forwards] == [2, 3 + (modality_scale > 1), 2]
    assert torch.equal(window[0], plain[0])
    assert relative_error(window[1], plain[1]) > 100 * FP32_RELATIVE
    with stg_engine.attach(pipe, STGConfig(layers=(1,), scale=0.0)):
        assert all(map(torch.equal, states(**NO_MODALITY), plain))


@pytest.mark.parametrize(
    "changes", [{"rescale": 0.5}, {"cfg_star": True}, {"arithmetic": "model"}], ids=lambda changes: next(iter(changes))
)
def test_what_the_pipeline_combines_is_not_the_configs(pipe, changes):
    field = next(iter(changes))
    with (
        stg_engine.attach(pipe, STGConfig(layers=(1,), **changes)),
        pytest.raises(ValueError, match=f"{field}=.* is not allowed with LTX2Pipeline, which combines"),
    ):
        ltx2_pipes.latents(pipe)
