"""The shipped model: its data, the reader that judges clips, the folder itself, and the training that made it."""

import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import LTXPipeline
from torch import nn

from stg_engine.demo import SETTING, model_path
from stg_engine.demo.data import (
    DIRECTIONS,
    FRAMES,
    HEIGHT,
    WIDTH,
    ClipSpec,
    clip,
    combinations,
    extent,
    random_mover,
    random_specs,
)
from stg_engine.demo.evaluate import captions_of, generate, score
from stg_engine.demo.networks import MAX_TOKENS, build_tokenizer
from stg_engine.demo.reader import read
from stg_engine.demo.training import fit


@pytest.fixture(scope="module")
def pipe() -> LTXPipeline:
    return LTXPipeline.from_pretrained(model_path())


def test_reader_reads_rendered_clips_of_all_combinations():
    rng = random.Random(0)
    for shape, color, direction, background in combinations():
        spec = ClipSpec((random_mover(rng, shape, color, direction),), background)
        reading = read(clip(spec))
        assert reading.matches(spec)["all"], (spec, reading)
        assert reading.movers[0].iou > 0.95
        assert reading.stray == 0


def test_reader_reads_rendered_clips_of_two_shapes():
    for spec in islice(random_specs(1, two_shapes=True), 50):
        assert read(clip(spec), 2).matches(spec)["all"], spec


@pytest.mark.parametrize("part", ["shape", "color", "direction", "background"])
def test_reader_rejects_a_wrong_caption(part):
    rng = random.Random(0)
    shown = ClipSpec((random_mover(rng, "circle", "red", "left"),), "gray")
    said = {"shape": "circle", "color": "red", "direction": "left", "background": "gray"}
    said |= {part: {"shape": "square", "color": "purple", "direction": "up", "background": "black"}[part]}
    wrong = ClipSpec((random_mover(rng, said["shape"], said["color"], said["direction"]),), said["background"])
    matches = read(clip(shown)).matches(wrong)
    assert not matches.pop(part)
    assert not matches.pop("all")
    assert all(matches.values())


def test_clips_depend_on_the_seed_alone():
    first, second, other = (list(islice(random_specs(seed), 20)) for seed in (3, 3, 4))
    assert first == second
    assert first != other
    assert torch.equal(clip(first[0]), clip(second[0]))


def test_moving_shapes_stay_inside():
    for spec in islice(random_specs(2), 200):
        for mover in spec.movers:
            side, up, down = extent(mover.shape, mover.radius)
            step_x, step_y = DIRECTIONS[mover.direction]
            for frame in (0, FRAMES - 1):
                x, y = mover.x + step_x * mover.speed * frame, mover.y + step_y * mover.speed * frame
                assert side <= x <= WIDTH - side, mover
                assert up <= y <= HEIGHT - down, mover


def test_vocabulary_is_closed(pipe):
    singles = [spec.caption for spec in captions_of(len(combinations()), 0)]
    captions = singles + [spec.caption for spec in captions_of(200, 0, two_shapes=True)] + [SETTING.prompt]
    for tokenizer in (build_tokenizer(), pipe.tokenizer):
        for caption, tokens in zip(captions, tokenizer(captions).input_ids, strict=True):
            assert tokenizer.unk_token_id not in tokens
            assert len(tokens) == len(caption.split()) + 1


def test_empty_prompt_leaves_something_to_attend_to(pipe):
    _, mask, _, negative_mask = pipe.encode_prompt("a red circle", max_sequence_length=MAX_TOKENS)
    assert mask.sum() == 4
    assert negative_mask.sum() == 1


def test_shipped_folder_is_small_and_of_this_repo_alone():
    files = list(model_path().rglob("*"))
    assert sum(file.stat().st_size for file in files if file.suffix == ".safetensors") <= 24e6
    assert not any("_name_or_path" in file.read_text(encoding="utf-8") for file in files if file.suffix == ".json")


def test_shipped_model_follows_captions(pipe):
    specs = captions_of(10, seed=0)
    clips = generate(pipe, specs, guidance_scale=SETTING.guidance_scale, progress=False)
    assert clips.shape == (10, 3, SETTING.frames, SETTING.height, SETTING.width)
    assert score(clips, specs).parts["all"] >= 0.9


def test_shipped_model_runs_in_bfloat16():
    pipe = LTXPipeline.from_pretrained(model_path(), torch_dtype=torch.bfloat16)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    specs = captions_of(2, seed=0)
    clips = generate(pipe, specs, guidance_scale=SETTING.guidance_scale, progress=False)
    assert score(clips, specs).parts["all"] == 1


@pytest.mark.parametrize("block", [4, 11])
def test_blocks_matter(pipe, block):
    """Skipping a block changes the velocity by more than rounding, so there is something to guide with."""
    torch.manual_seed(0)
    latents = torch.randn(1, 144, pipe.transformer.config.in_channels)
    text, mask, _, _ = pipe.encode_prompt(SETTING.prompt)
    given = {"timestep": torch.tensor([700.0]), "encoder_attention_mask": mask, "return_dict": False}
    given |= {"num_frames": 9, "height": 4, "width": 4, "rope_interpolation_scale": (2 / SETTING.fps, 16, 16)}
    skip = pipe.transformer.transformer_blocks[block].register_forward_hook(
        lambda _module, _args, kwargs, _output: kwargs["hidden_states"], with_kwargs=True
    )
    with torch.no_grad():
        weak = pipe.transformer(latents, text, **given)[0]
        skip.remove()
        full = pipe.transformer(latents, text, **given)[0]
    assert (full - weak).norm() > 0.02 * full.norm()


def test_training_resumes_as_if_never_stopped(tmp_path: Path):
    def train(name: str, stops: list[int]) -> tuple[nn.Module, nn.Module]:
        for stop_at in stops:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 6))

            def loss(step: int, model: nn.Module = model) -> torch.Tensor:
                x = torch.randn(4, 6)
                return (model(x) - step * x).square().mean()

            averaged = fit(model, loss, tmp_path / name, steps=4, lr=1e-2, warmup=2, stop_at=stop_at)
        return model, averaged

    straight, resumed = train("straight.pt", [4]), train("resumed.pt", [2, 4])
    for one, other in zip(straight, resumed, strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    untrained = nn.Linear(6, 8)
    assert not torch.equal(straight[0][0].weight, untrained.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.pt", "straight.pt"]
