"""Settings: wrong values are refused by name, the step's guidance follows progress and sigma."""

import math

import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

from stg_engine import ScheduleEntry, Skip, STGConfig, STGSchedule
from stg_engine.config import AudioGuidance
from stg_engine.presets import PRESETS

WRONG = [
    ({"layers": ()}, r"layers=\(\) is empty"),
    ({"layers": (3, 3)}, r"layers=\(3, 3\) holds a duplicate"),
    ({"layers": (-1,)}, "holds -1; block indices are integers, 0-based, not negative"),
    ({"layers": (1.5,)}, "holds 1.5"),
    ({"layers": (True,)}, "holds True"),
    ({"layers": 19}, "layers=19 is not allowed; it must be a sequence"),
    ({"layers": "19"}, "layers='19' is not allowed"),
    ({"scale": -1.0}, "scale=-1.0 is not allowed; it must be a finite number at least 0"),
    ({"scale": math.nan}, "scale=nan"),
    ({"scale": math.inf}, "scale=inf"),
    ({"scale": "1"}, "scale='1'"),
    ({"scale": True}, "scale=True"),
    ({"mode": "stg-r"}, "mode='stg-r' is not allowed; choose one of 'residual', 'attention'"),
    ({"axis": "depth"}, "axis='depth' is not allowed; choose one of None, 'spatial', 'temporal'"),
    ({"rescale": 1.1}, "rescale=1.1 is not allowed; it must be a finite number between 0 and 1"),
    ({"start": -0.1}, "start=-0.1"),
    ({"stop": 2}, "stop=2"),
    ({"start": 0.5, "stop": 0.5}, "start=0.5 is not allowed; it must be below stop=0.5"),
    ({"extra_skips": ((3,),)}, r"extra_skips=.*tuple of Skip"),
    ({"extra_skips": Skip((3,))}, r"extra_skips=.*tuple of Skip"),
    ({"extra_skips": None}, r"extra_skips=None .*tuple of Skip"),
    ({"extra_skips": (Skip((19,), 2.0),)}, "repeats a branch"),
    (
        {"schedule": STGSchedule((ScheduleEntry(1.0),), "at_or_below")},
        r"layers=\(19,\) is not allowed beside a schedule",
    ),
    ({"rescale_over": "video"}, "rescale_over='video'"),
    ({"arithmetic": "bf16"}, "arithmetic='bf16'"),
    ({"cfg_star": "yes"}, "cfg_star='yes'"),
    ({"cfg_star": np.array([True])}, "cfg_star=array"),
    ({"rescale_cfg": 1}, "rescale_cfg=1 is not allowed; choose one of True, False"),
    ({"weak_pass": "negative"}, "weak_pass='negative'.*'prompt', 'negative_prompt', 'uncond'"),
    ({"weak_pass": "uncond", "scale": 2.0}, "scale=2.0 is not allowed with weak_pass='uncond'.*1 is on, 0 is off"),
    ({"weak_pass": "uncond", "extra_skips": (Skip((3,)),)}, r"extra_skips=.*there is one uncond pass"),
    ({"space": "v"}, "space='v' is not allowed; choose one of 'model', 'x0'"),
    ({"space": "x0", "arithmetic": "model"}, "arithmetic='model' is not allowed with space='x0'"),
    ({"zero_init": 1.1}, "zero_init=1.1.*between 0 and 1"),
    ({"audio": 2.0}, "audio=2.0 is not allowed; it must be an AudioGuidance"),
    (
        {"audio": AudioGuidance(scale=1.0), "extra_skips": (Skip((3,)),)},
        "audio.scale=1.0 is not allowed: it replaces the scale of one skip branch",
    ),
    ({"audio": AudioGuidance(scale=1.0), "weak_pass": "uncond"}, "audio.scale=1.0"),
    ({"audio": AudioGuidance(modality_scale=2.0)}, r"audio.modality_scale=2.0 .*without modality_scale above 1"),
    ({"scale": 10**400}, "scale=1000"),
    ({"layers": b"\x01"}, "layers=b"),
    ({"layers": {1: 2}}, "layers={1: 2}"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else None)
def test_wrong_values(fields, message):
    with pytest.raises(ValueError, match=message):
        STGConfig(**{"layers": (19,), **fields})


def test_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="layer"):
        STGConfig(layer=19)


def one_entry(guidance_scale, scale=1.0):
    return STGSchedule((ScheduleEntry(0.5, (1,), scale, guidance_scale=guidance_scale),), "at_or_below")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: STGSchedule((), "at_or_below"), "list at least one"),
        (lambda: STGSchedule(((0.5, (1,), 1.0),), "at_or_below"), r"entries=.*tuple of ScheduleEntry"),
        (lambda: ScheduleEntry(1.5), r"sigma=1.5 .*between 0 and 1"),
        (lambda: STGSchedule((ScheduleEntry(0.5), ScheduleEntry(0.9)), "at_or_below"), "strictly falling"),
        (lambda: STGSchedule((ScheduleEntry(0.5),), "nearest"), "rule='nearest'.*'at_or_below', 'at_or_above'"),
        (lambda: ScheduleEntry(0.5, (), 1.0), r"layers=\(\) is empty"),
        (lambda: ScheduleEntry(0.5, (1,), 1.0, guidance_scale=-1.0), "guidance_scale=-1.0"),
        (lambda: STGConfig(schedule="dynamic"), "schedule='dynamic' is not allowed; it must be an STGSchedule"),
        (
            lambda: STGConfig(schedule=one_entry(1.0), weak_pass="negative_prompt"),
            r"guidance_scale=1.0 of the entry at sigma=0.5 .*weak_pass='negative_prompt' acts through CFG",
        ),
        (
            lambda: STGConfig(schedule=one_entry(3.0, 2.0), weak_pass="uncond"),
            "scale=2.0 is not allowed with weak_pass",
        ),
        (lambda: STGConfig(schedule=one_entry(3.0), audio=AudioGuidance()), "audio=.*beside a schedule"),
        (lambda: AudioGuidance(rescale=1.5), r"audio.rescale=1.5 .*between 0 and 1"),
        (lambda: AudioGuidance(modality_scale=-1.0), r"audio.modality_scale=-1.0 .*at least 1"),
        (lambda: STGConfig.preset("ltx"), "preset='ltx' is not known; choose one of ltx-video-2b, "),
    ],
)
def test_wrong_schedules_and_presets(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_layers_are_sorted_and_any_sequence_will_do():
    assert STGConfig(layers=[19, 14]).layers == STGConfig(layers=range(14, 20, 5)).layers == (14, 19)
    assert hash(STGConfig(layers=[19])) == hash(STGConfig(layers=(19,)))


@pytest.mark.parametrize(
    ("progress", "on"), [(0.0, False), (0.2, True), (0.5, True), (0.79, True), (0.8, False), (0.99, False)]
)
def test_window(progress, on):
    step = STGConfig(layers=(1,), rescale=0.7, start=0.2, stop=0.8).at(progress)
    assert bool(step.skips) == on
    assert step.rescale == (0.7 if on else 0.0)


def test_a_setting_asks_for_what_it_needs():
    with pytest.raises(ValueError, match=r"progress=None is not allowed: start=0.2, stop=1.0 need"):
        STGConfig(layers=(1,), start=0.2).at(sigma=0.5)
    with pytest.raises(ValueError, match="sigma=None is not allowed: this setting has a schedule"):
        STGConfig.preset("ltx-video-13b").at(progress=0.5)
    assert STGConfig(layers=(1,)).at().names == ("skip",)


def test_branch_names():
    config = STGConfig(layers=(1,), extra_skips=(Skip((2,), 0.0), Skip((3,)), Skip((4,))))
    assert config.at().names == ("skip", "skip2", "skip3")


def test_scale_0_has_no_rescale():
    assert STGConfig(layers=(1,), scale=0.0, rescale=0.7).at().rescale == 0.0


def test_weak_pass_of_a_step():
    step = STGConfig(layers=(1,), weak_pass="uncond").at()
    assert (step.names, step.needs_uncond) == ((), True)
    step = STGConfig(layers=(1,), weak_pass="negative_prompt").at()
    assert (step.names, step.needs_uncond) == (("skip",), True)
    assert not STGConfig(layers=(1,)).at().needs_uncond
    off = STGConfig(layers=(1,), weak_pass="uncond", start=0.5).at(0.0)
    assert not off.needs_uncond
    assert off.is_plain


def test_rescale_cfg():
    fields = {"layers": (1,), "rescale": 0.7, "start": 0.5}
    assert STGConfig(**fields).at(0.0).is_plain
    step = STGConfig(**fields, rescale_cfg=True).at(0.0)
    assert (step.skips, step.rescale, step.is_plain) == ((), 0.7, False)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({}, False),
        ({"space": "x0"}, False),
        ({"space": "x0", "rescale": 0.5}, True),
        ({"space": "x0", "cfg_star": True}, True),
        ({"space": "x0", "audio": AudioGuidance(rescale=0.5)}, True),
        ({"zero_init": 0.99}, True),
    ],
    ids=str,
)
def test_needs_sigma(fields, needed):
    assert STGConfig(layers=(1,), **fields).needs_sigma == needed


def entry_numbers(schedule, sigmas):
    return [schedule.entries.index(schedule.at(sigma)) for sigma in sigmas]


def test_ltx_video_13b_bins():
    """Executed bins of the first pass: 30-step linear-quadratic schedule, threshold .025, last 3 steps not run.

    Two listed values are rounded up, so steps 14 and 19 fall one bin later than their position in the list suggests.
    """
    schedule = STGConfig.preset("ltx-video-13b").schedule
    sigmas = linear_quadratic_schedule(30, threshold_noise=0.025).tolist()[:27]
    assert entry_numbers(schedule, sigmas) == [0, 1, 1, 2, 2, *[3] * 5, *[4] * 4, *[5] * 5, *[6] * 8]


def test_the_rules_differ():
    entries = tuple(ScheduleEntry(sigma) for sigma in (1.0, 0.9, 0.5))
    sigmas = [1.0, 0.95, 0.9, 0.7, 0.5, 0.2]
    assert entry_numbers(STGSchedule(entries, "at_or_below"), sigmas) == [0, 1, 1, 2, 2, 2]
    assert entry_numbers(STGSchedule(entries, "at_or_above"), sigmas) == [0, 0, 1, 1, 2, 2]


def test_presets_are_published_settings():
    first = PRESETS["ltx-video-2b"].config
    assert (first.layers, first.scale, first.mode, first.rescale) == ((19,), 1.0, "residual", 0.0)
    entries = PRESETS["ltx-video-13b"].config.schedule.entries
    assert [e.guidance_scale for e in entries] == [1, 1, 6, 8, 6, 1, 1]
    assert [e.scale for e in entries] == [0, 0, 4, 4, 4, 2, 1]
    assert [e.rescale for e in entries] == [0, 0, 0.5, 0.5, 0, 0, 0]
    for preset in PRESETS.values():
        assert preset.source
        assert max(layer for skip in preset.config.skips for layer in skip.layers) < preset.blocks
    assert STGConfig.preset("ltx-video-2b", scale=2.0).scale == 2.0


@pytest.mark.parametrize("sigma", [math.nan, -0.1, 1.5, 700.0])
def test_sigma_out_of_range(sigma):
    config = STGConfig(schedule=STGSchedule((ScheduleEntry(0.5),), "at_or_below"))
    with pytest.raises(ValueError, match=f"sigma={sigma} is not allowed.*between 0 and 1"):
        config.at(sigma=sigma)


def test_numpy_numbers():
    config = STGConfig(layers=np.arange(2), scale=np.float32(0.5))
    assert config == STGConfig(layers=(0, 1), scale=0.5)
    assert [type(layer) for layer in config.layers] == [int, int]


@pytest.mark.parametrize("progress", [1.0, 2, -0.1, math.nan])
def test_progress_out_of_range(progress):
    with pytest.raises(ValueError, match=f"progress={progress:.1f}? .*(step index / number of steps|at least 0)"):
        STGConfig(layers=(1,)).at(progress)


def test_a_tensor_for_a_number():
    config = STGConfig(schedule=STGSchedule((ScheduleEntry(0.5),), "at_or_below"))
    with pytest.raises(ValueError, match=r"pass float\(sigma\)"):
        config.at(sigma=torch.tensor(0.5))
