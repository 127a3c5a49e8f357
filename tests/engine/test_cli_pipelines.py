"""`stg-engine generate` on a tiny saved pipeline of each family, and what it refuses."""

import json
from dataclasses import replace
from importlib import import_module
from inspect import signature
from types import ModuleType

import av
import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from engine.test_cli import names, one_error_line
from engine.tiny import tiny_pipeline
from models import ltx2_pipes
from models.families import cogvideox
from models.pipelines import cogvideox as cogvideox_pipes
from models.pipelines import hunyuan_video, latte, mochi, svd, wan
from models.text import tiny_t5

import stg_engine
from stg_engine import arguments, cli, compare, generate, media
from stg_engine.calls import PIPELINES
from stg_engine.config import STGConfig
from stg_engine.presets import PRESETS
from stg_engine.settings import GUIDANCE_SCALES, Setting


def cogvideox_pipeline():
    """The prompt has the length that the pipeline pads it to."""
    pipe = cogvideox_pipes.CASES[0].build()
    size = {"sample_height": 4, "sample_width": 4, "sample_frames": 9, "max_text_seq_length": 226}
    pipe.register_modules(
        transformer=cogvideox.model("CogVideoX-2B", torch.float32, in_channels=4, text_embed_dim=32, **size)
    )
    return pipe


def wan_case(name):
    return next(case for case in wan.CASES if case.name == name).build


def hunyuan_video_pipeline():
    """Its text encoders are here to be saved; `encode_prompt` is replaced."""
    pipe, other = hunyuan_video.CASES[0].build(), {f"{name}_2": part for name, part in tiny_t5().items()}
    pipe.register_modules(**tiny_t5(), **other)
    return pipe


def ltx2_pipeline():
    pipe = ltx2_pipes.build("text", "LTX-2.3")
    vocoder = LTX2Vocoder(16, 8, 2, [4], [2], [3], [[1]])
    pipe.register_modules(**tiny_t5(), vocoder=vocoder)
    return pipe


FAMILIES = {
    "MochiPipeline": (mochi.CASES[0].build, "--height 16 --width 16 --frames 7", 4.5, 30),
    "CogVideoXPipeline": (cogvideox_pipeline, "--height 32 --width 32 --frames 9", 6.0, 8),
    "LattePipeline": (latte.CASES[0].build, "--height 8 --width 8 --frames 3", 7.5, 8),
    "WanPipeline": (wan_case("WanPipeline"), "--height 32 --width 32 --frames 9", 5.0, 16),
    "WanPipeline 2.2": (wan_case("WanPipeline 2.2"), "--height 32 --width 32 --frames 9", 5.0, 16),
    "WanPipeline 2.2 TI2V": (wan_case("WanPipeline 2.2 TI2V"), "--height 32 --width 32 --frames 9", 5.0, 16),
    "SkyReelsV2Pipeline": (wan_case("SkyReelsV2Pipeline"), "--height 32 --width 32 --frames 9", 6.0, 24),
    "SkyReelsV2DiffusionForcingPipeline": (
        wan_case("SkyReelsV2DiffusionForcingPipeline"),
        "--height 32 --width 32 --frames 9",
        6.0,
        24,
    ),
    "HunyuanVideoPipeline": (hunyuan_video_pipeline, "--height 16 --width 16 --frames 9", 1.0, 15),
}
"""name -> (a tiny pipeline, its size, its own guidance scale, frames per second)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function: the folder of a saved pipeline of that name."""
    root, builders = tmp_path_factory.mktemp("pipelines"), {name: family[0] for name, family in FAMILIES.items()}
    builders |= {"LTX2Pipeline": ltx2_pipeline, "LTXPipeline": tiny_pipeline, "SVD": svd.CASES[0].build}

    def saved(name):
        if not (root / name).exists():
            builders[name]().save_pretrained(root / name)
        return str(root / name)

    return saved


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Prompts without ftfy and HunyuanVideo's text encoders; comparisons of one round."""
    monkeypatch.setattr(compare, "ROUNDS", 1)
    ftfy = ModuleType("ftfy")
    ftfy.fix_text = str
    monkeypatch.setattr(arguments, "find_spec", lambda name: ftfy)
    for name in ("pipeline_skyreels_v2", "pipeline_skyreels_v2_diffusion_forcing"):
        module = import_module(f"diffusers.pipelines.skyreels_v2.{name}")
        monkeypatch.setattr(module, "ftfy", ftfy, raising=False)

    def encode_prompt(self, prompt, **_):
        generator = torch.Generator().manual_seed(len(prompt))
        mask = torch.arange(6)[None] < 3 + len(prompt) % 4
        return torch.randn(1, 6, 16, generator=generator), torch.randn(1, 8, generator=generator), mask.to(torch.int64)

    def encode_both(self, prompt, negative_prompt, **_):
        width, generator = ltx2_pipes.WIDTH * ltx2_pipes.STATES, torch.Generator().manual_seed(len(prompt))
        embeds, mask = torch.randn(2, 1, 6, width, generator=generator), torch.ones(1, 6, dtype=torch.int64)
        return embeds[0], mask, embeds[1], mask

    monkeypatch.setattr(diffusers.HunyuanVideoPipeline, "encode_prompt", encode_prompt)
    monkeypatch.setattr(diffusers.LTX2Pipeline, "encode_prompt", encode_both)


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """A function: options -> (metadata, the frames written), of a clip of 3 steps in which layer 1 is skipped."""

    def run(name, *options):
        frames = {}
        write = media.write_mp4
        with monkeypatch.context() as patch:
            patch.setattr(
                media,
                "write_mp4",
                lambda path, f, fps, audio: (frames.update(f=f, fps=fps), write(path, f, fps, audio))[1],
            )
            assert cli.main(["generate", *arguments_of(folder, name, tmp_path), *options]) == 0
        return json.loads((tmp_path / "clip.json").read_text()), frames["f"], frames["fps"]

    return run


def arguments_of(folder, name, tmp_path):
    size = FAMILIES[name][1] if name in FAMILIES else "--height 32 --width 32 --frames 5"
    arguments = f"--prompt a|--out {tmp_path}/clip.mp4|--steps 3|--stg-layers 1|--model {folder(name)}"
    return [word for part in arguments.split("|") for word in part.split(" ", 1)] + size.split()


@pytest.mark.parametrize("name", FAMILIES)
def test_compare(run, tmp_path, name):
    """Every family: a clip, its own guidance scale, the engine equal to plain passes."""
    data, frames, fps = run(name, "--compare")
    _, size, g, rate = FAMILIES[name]
    assert names(tmp_path) == ["clip.json", "clip.mp4", "clip.png"]
    height, width, count = map(int, size.split()[1::2])
    assert frames.shape == (count, height, width, 3)
    assert (data["height"], data["width"], data["frames"], data["steps"]) == (height, width, count, 3)
    assert (data["guidance_scale"], data["fps"], fps) == (g, rate, rate)
    assert data["pipeline"] == name.split()[0]
    cfg = f"CFG {g:g}"
    labels = ["no guidance", *([cfg] if g > 1 else []), f"{f'{cfg} + ' if g > 1 else ''}STG 1"]
    assert [clip["label"].split("\n")[0] for clip in data["runs"]] == labels
    assert data["compare"]["passes"] == len(labels)
    assert 0 < data["compare"]["error"] <= compare.MARGIN * data["compare"]["rounding"] < 1e-4


@pytest.mark.parametrize("name", ["MochiPipeline", "WanPipeline", "WanPipeline 2.2"])
def test_steps_that_are_compared_have_the_prompts_of_the_run(run, folder, monkeypatch, name):
    seen, own = [], generate.compare
    monkeypatch.setattr(generate, "compare", lambda config, steps, **o: seen.extend(steps) or own(config, steps, **o))
    run(name, "--compare", "--negative-prompt", "bb", "--guidance-scale", "2")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(name))
    embeddings = [pipe.encode_prompt(text, do_classifier_free_guidance=False)[0] for text in ("a", "bb")]
    assert not torch.allclose(embeddings[0][:, :2], embeddings[1][:, :2])
    assert [step.progress for step in seen] == [0, 1 / 3, 2 / 3]
    for step in seen:
        for prompt, embedding in zip((step.cond, step.uncond), embeddings, strict=True):
            # "a" and its end; calls and `encode_prompt` pad to different lengths.
            torch.testing.assert_close(prompt["encoder_hidden_states"][:, :2], embedding[:, :2])
        assert (step.guidance_scale, step.sigma, len(step.shared["hidden_states"])) == (2.0, None, 1)
    assert len({id(step.transformer) for step in seen}) == (2 if name == "WanPipeline 2.2" else 1)
    assert not torch.equal(seen[0].shared["hidden_states"], seen[1].shared["hidden_states"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_clip_is_what_the_pipeline_gives(run, folder, name):
    data, written, _ = run(name, "--seed", "5", "--guidance-scale", "2", "--negative-prompt", "b")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(name))
    pipe.set_progress_bar_config(disable=True)
    height, width, count = map(int, FAMILIES[name][1].split()[1::2])
    call = {"height": height, "width": width, "num_inference_steps": 3, "negative_prompt": "b", "output_type": "np"}
    call["video_length" if name == "LattePipeline" else "num_frames"] = count
    call["true_cfg_scale" if name == "HunyuanVideoPipeline" else "guidance_scale"] = 2.0
    with stg_engine.attach(pipe, STGConfig(layers=(1,))):
        frames = pipe("a", generator=torch.Generator().manual_seed(5), **call).frames[0]
    assert np.array_equal(written, media.to_uint8(frames))
    plain = pipe("a", generator=torch.Generator().manual_seed(5), **call).frames[0]
    assert not np.array_equal(written, media.to_uint8(plain))
    assert data["guidance_scale"] == 2.0


def test_ltx_2_is_the_stg_of_diffusers_itself(run, folder, tmp_path):
    """Scales, rescale and sound reach the pipeline, whose own STG gives the same clip."""
    mode = ["--stg-mode", "attention", "--stg-scale", "8", "--rescale", "0.6", "--guidance-scale", "2"]
    data, frames, _ = run("LTX2Pipeline", *mode, "--fps", "12")
    pipe = diffusers.LTX2Pipeline.from_pretrained(folder("LTX2Pipeline"))
    pipe.set_progress_bar_config(disable=True)
    scales = {"guidance_scale": 2.0, "stg_scale": 8.0, "modality_scale": 1.0, "guidance_rescale": 0.6}
    call = {**scales, **{f"audio_{name}": value for name, value in scales.items()}}
    call |= {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 12, "num_inference_steps": 3}
    call |= {"spatio_temporal_guidance_blocks": [1], "negative_prompt": "", "output_type": "np"}
    output = pipe("a", generator=torch.Generator().manual_seed(0), **call)
    assert np.abs(frames.astype(int) - media.to_uint8(output.frames[0])).max() <= 1
    with av.open(str(tmp_path / "clip.mp4")) as container:
        (video,), (sound,) = container.streams.video, container.streams.audio
        assert (video.average_rate, sound.rate, sound.channels) == (12, 24000, 2)
        samples = sum(frame.samples for frame in container.decode(sound))
    # AAC comes in blocks of 1024 samples, with one or two of them for its delay.
    assert output.audio.shape[-1] <= samples <= output.audio.shape[-1] + 3 * 1024
    assert data["guidance_scale"] == 2.0
    plain = pipe("a", generator=torch.Generator().manual_seed(0), **{**call, "stg_scale": 0.0, "audio_stg_scale": 0.0})
    assert np.abs(frames.astype(int) - media.to_uint8(plain.frames[0])).max() > 4


def test_what_the_preset_of_ltx_2_says_goes_to_the_pipeline():
    pipe, preset = ltx2_pipes.build("text", "LTX-2.3"), PRESETS["ltx-2.3"]
    setting = Setting(preset.config, 3.0, preset.name)
    scales = arguments.guidance_arguments(pipe, setting)
    assert scales == {
        "guidance_scale": 3.0,
        "stg_scale": 1.0,
        "modality_scale": 3.0,
        "guidance_rescale": 0.7,
        "audio_guidance_scale": 7.0,
        "audio_stg_scale": 1.0,
        "audio_modality_scale": 3.0,
        "audio_guidance_rescale": 0.7,
    }
    config = arguments.engine_config(pipe, preset.config)
    assert (config.layers, config.modality_scale, config.rescale, config.audio) == ((28,), 3.0, 0.0, None)
    without = arguments.guidance_arguments(pipe, Setting(None, 1.0, None))
    assert {name: value for name, value in without.items() if "rescale" not in name} == {
        name: 0.0 if "stg" in name else 1.0 for name in scales if "rescale" not in name
    }
    assert arguments.guidance_arguments(pipe, replace(setting, guidance_scale=1.0))["audio_guidance_scale"] == 1.0


def test_latte_by_axis(run, tmp_path):
    data, _, _ = run("LattePipeline", "--stg-mode", "attention", "--stg-axis", "temporal", "--compare", "--fps", "5")
    assert (data["stg"]["axis"], data["fps"]) == ("temporal", 5)
    assert data["runs"][-1]["label"] == "CFG 7.5 + STG 1\n(temporal attention, layers 1)"
    assert data["compare"]["error"] <= compare.MARGIN * data["compare"]["rounding"]


def test_frames_that_the_pipeline_does_not_make_are_told(run, capsys):
    data, frames, _ = run("MochiPipeline", "--frames", "9")
    assert (len(frames), data["frames"]) == (7, 7)
    assert "warning: frames=9: MochiPipeline made 7 frames" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["2", None])
def test_hunyuan_video_has_uncond_only_if_asked_for(run, scale):
    options = [] if scale is None else ["--guidance-scale", scale]
    data, _, _ = run("HunyuanVideoPipeline", *options)
    assert data["plan"]["pass_equivalents"] == (1.5 if scale is None else 2.5)
    assert "10 of 12 block-rows" in data["report"] if scale else "6 of 8 block-rows" in data["report"]


def test_comparison_of_a_weak_uncond_counts_two_passes(run):
    data, _, _ = run("WanPipeline", "--preset", "slg-uncond", "--compare")
    assert data["compare"]["passes"] == 2
    assert data["compare"]["error"] <= compare.MARGIN * data["compare"]["rounding"]


@pytest.mark.parametrize(
    ("name", "options", "needles"),
    [
        ("MochiPipeline", "--height 24", ["height=24", "multiple of 16"]),
        ("LattePipeline", "--width 10", ["`height` and `width` have to be divisible by 8 but are 8 and 10."]),
        ("WanPipeline", "--stg-axis temporal", ["axis='temporal'", "no factorised attention"]),
        ("LattePipeline", "--stg-mode attention", ["axis=None", "'spatial', 'temporal'"]),
        ("LattePipeline", "--stg-axis up", ["axis='up'", "'spatial', 'temporal'"]),
        ("LTX2Pipeline", "--compare", ["compare: LTX-2 predicts video and audio"]),
        ("LTX2Pipeline", "--frames 6", ["frames=6", "multiple of"]),
        ("SVD", "", ["StableVideoDiffusionPipeline", "generate does not run", "generate runs LTXPipeline"]),
    ],
)
def test_bad_requests(folder, tmp_path, capsys, name, options, needles):
    assert cli.main(["generate", *arguments_of(folder, name, tmp_path), *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error = err.strip().split("\n")[-1]  # below diffusers' own warnings of tiny parts
    assert error.startswith("stg-engine: error: ")
    for needle in needles:
        assert needle in error
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("index", "needles"),
    [
        ('{"_class_name": "FluxPipeline"}', ["is a FluxPipeline, which is not supported", *arguments.TEXT_TO_VIDEO]),
        ('{"_class_name": "WanImageToVideoPipeline"}', ["no image", "stg_engine.attach"]),
        ("{", ["cannot read", "model_index.json"]),
        ("[]", ["cannot read", "model_index.json"]),
    ],
)
def test_the_pipeline_is_known_before_its_weights_load(tmp_path, capsys, monkeypatch, index, needles):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights"))
    (tmp_path / "model_index.json").write_text(index)
    options = ["--model", str(tmp_path), "--prompt", "a", "--out", str(tmp_path / "clip.mp4")]
    assert cli.main(["generate", *options]) == 2
    one_error_line(capsys, *needles)


def test_a_package_that_prompts_need(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    assert cli.main(["generate", *arguments_of(folder, "SkyReelsV2Pipeline", tmp_path)]) == 2
    assert "SkyReelsV2Pipeline need the package ftfy, which is not installed" in capsys.readouterr().err


def test_an_option_that_the_call_does_not_take():
    class Square:
        def __call__(self, prompt, size, num_inference_steps=7): ...

    with pytest.raises(ValueError, match=r"height=8 is not allowed: Square does not take it"):
        arguments.call_arguments(Square(), {"height": 8, "steps": None})
    assert arguments.call_arguments(Square(), {"steps": 3, "fps": 5, "width": None}) == {"num_inference_steps": 3}
    assert (arguments.default_of(Square(), "steps"), arguments.default_of(Square(), "fps")) == (7, None)


@pytest.mark.parametrize("name", arguments.TEXT_TO_VIDEO)
def test_defaults_are_those_of_the_pipelines(name):
    kind, parameters = getattr(diffusers, name), signature(getattr(diffusers, name).__call__).parameters
    known = arguments.TEXT_TO_VIDEO[name]
    transformer = str(kind.__init__.__annotations__["transformer"])
    (scale,) = [scale for model, scale in GUIDANCE_SCALES.items() if model in transformer]
    assert scale == parameters[known.guidance_scale].default
    assert {"prompt", "negative_prompt", "generator", "output_type", "callback_on_step_end"} <= set(parameters)
    assert name in PIPELINES
    rates = [parameters[rate].default for rate in ("frame_rate", "fps") if rate in parameters]
    assert rates in ([], [known.fps])


def test_plan_of_a_unet(folder, capsys):
    assert cli.main(["plan", "--model", folder("SVD"), "--stg-layers", "0"]) == 0
    assert "Stable Video Diffusion" in capsys.readouterr().out
