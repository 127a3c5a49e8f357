"""`stg-engine generate` on a tiny saved pipeline of each family, and what it refuses."""

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from types import ModuleType, SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from engine.test_cli import names, one_error_line
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from engine.tiny import tiny_pipeline
from models import ltx2_pipes
from models.families import cogvideox
from models.pipelines import hunyuan_video, latte, mochi, svd, wan
from models.pipelines import cogvideox as cogvideox_pipes
from models.text import tiny_t5

import stg_engine
from stg_engine import arguments, cli, compare, media
from stg_engine.calls import PIPELINES
from stg_engine.config import Skip, STGConfig
from stg_engine.models import spec_of
from stg_engine.settings import GUIDANCE_SCALES


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

    def generate(name, *options):
        frames = {}
        write = media.write_mp4
        with monkeypatch.context() as patch:
            patch.setattr(media, "write_mp4", lambda path, f, fps: frames.update(f=f, fps=fps) or write(path, f, fps))
            assert cli.main(["generate", *arguments_of(folder, name, tmp_path), *options]) == 0
        return json.loads((tmp_path / "clip.json").read_text()), frames["f"], frames["fps"]

    return generate


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


def test_ltx_2(run):
    data, frames, _ = run("LTX2Pipeline", "--guidance-scale", "2", "--rescale", "0.5")
    assert frames.shape == (5, 32, 32, 3)
    print(data["report"])
