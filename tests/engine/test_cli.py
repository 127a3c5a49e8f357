"""The command `stg-engine`, run in this process on a tiny pipeline saved to disk; two tests start a real process."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.tape import TapeCapture
from engine.tiny import tiny_inputs, tiny_pipeline, tiny_transformer
from PIL import Image

import stg_engine
from stg_engine import cli, compare, generate, media, reference
from stg_engine.config import Skip, STGConfig
from stg_engine.runtime import graphs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Folder of a tiny pipeline with 4 blocks; height and width divisible by 32, frames by 4 plus 1."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def small(model, tmp_path, monkeypatch) -> list[str]:
    """Arguments of a quick `generate` into tmp_path/clip.mp4: 3 x 8 x 8 latents, 2 steps, layer 2 skipped."""
    monkeypatch.setattr(compare, "ROUNDS", 1)
    run = ["generate", "--model", model, "--prompt", "a red cat", "--out", str(tmp_path / "clip.mp4")]
    return [*run, "--height", "32", "--width", "32", "--frames", "9", "--steps", "2", "--stg-layers", "2"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_error_line(capsys, *needles: str) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("stg-engine: error: ")
    assert "Traceback" not in err
    for needle in needles:
        assert needle in err


BAD_SETTINGS = [
    ("--stg-layers 4", "layers=(4,)", "4 blocks, 0 to 3"),
    ("--stg-layers 1,1", "layers=(1, 1)", "duplicate"),
    ("--stg-layers -1", "layers=(-1,)", "not negative"),
    ("--stg-layers one", "--stg-layers", "'one'", "such as 19"),
    ("--stg-layers 2 --stg-scale -1", "scale=-1.0", "at least 0"),
    ("--stg-layers 2 --stg-scale nan", "scale=nan", "at least 0"),
    ("--stg-layers 2 --stg-scale x", "--stg-scale", "'x'"),
    ("--stg-layers 2 --stg-mode r", "mode='r'", "'residual', 'attention'"),
    ("--stg-layers 2 --rescale 1.5", "rescale=1.5", "between 0 and 1"),
    ("--stg-layers 2 --guidance-scale inf", "guidance_scale=inf", "finite"),
    ("--stg-layers 2 --guidance-scale -2", "guidance_scale=-2.0", "at least 0"),
    ("--preset nope", "preset='nope'", "ltx-video-2b"),
    ("--preset ltx-video-2b", "28 blocks", "has 4"),
    ("--preset nope", "with --stg-layers, one of stg"),
    ("--preset slg-uncond", "preset='slg-uncond' says how to combine", "--stg-layers"),
    ("--preset slg-uncond --stg-layers 1 --stg-scale 2", "scale=2.0", "weak_pass='uncond'"),
    ("--preset wan-official --stg-layers 1 --guidance-scale 1", "weak_pass='negative_prompt' acts through CFG"),
    ("", "stg_layers", "0 to 3", "--stg-scale 0"),
    ("--stg-scale 0 --stg-mode r", "mode='r'"),
    ("--stg-scale 0 --stg-layers 77", "layers=(77,)", "4 blocks, 0 to 3"),
    ("--stg-layer 2", "unrecognized arguments: --stg-layer 2"),
]


@pytest.mark.parametrize(("options", "needles"), [(text, needles) for text, *needles in BAD_SETTINGS])
def test_bad_settings(model, capsys, options, needles):
    assert cli.main(["plan", "--model", model, *options.split()]) == 2
    one_error_line(capsys, *needles)


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        (
            "--preset stg --stg-layers 1 --rescale 0.7",
            ["convention stg (junhahyung/STGuidance", "residual skip of 1 at"],
        ),
        (
            "--preset wan-official --stg-layers 1",
            ["on the negative prompt at scale 1", "forks from uncond in block 1"],
        ),
        ("--preset slg-uncond --stg-layers 1", ["in uncond", "7 of 8 block-rows"]),
    ],
)
def test_plans_of_conventions(model, capsys, options, needles):
    assert cli.main(["plan", "--model", model, *options.split()]) == 0
    out = capsys.readouterr().out
    for needle in needles:
        assert needle in out


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        (["--steps", "0"], ["--steps", "'0'", "from 1"]),
        (["--seed", "-1"], ["--seed", "'-1'", "from 0"]),
        (["--frames", "8"], ["frames=8", "multiple of 4 plus 1"]),
        (["--height", "48"], ["height=48", "multiple of 32"]),
        (["--width", "33"], ["width=33", "multiple of 32"]),
        (["--fps", "2.5"], ["--fps", "'2.5'"]),
        (["--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["--device", "cuda:99"], ["device='cuda:99'", "cpu"]),
        (["--device", "toaster"], ["device='toaster'", "cpu"]),
        (["--execution", "fast"], ["--execution", "'fast'", "serial"]),
        (["--kernels", "fast"], ["--kernels", "'fast'", "off"]),
        (["--execution", "serial", "--max-rows", "2"], ["max_rows=2"]),
        (["--prompt", " "], ["prompt=' '"]),
        (["--compare", "--stg-scale", "0"], ["compare"]),
        (["--stg-layers", "7"], ["layers=(7,)", "0 to 3"]),
        (["--out", "clip.gif"], ["out='clip.gif'", ".mp4"]),
        (["--out", "no/such/folder/clip.mp4"], ["out", "does not exist"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_requests_end_before_anything_is_computed(small, tmp_path, capsys, monkeypatch, options, needles):
    monkeypatch.setattr("diffusers.LTXPipeline.encode_prompt", lambda *_, **__: pytest.fail("the pipeline ran"))
    assert cli.main([*small, *options]) == 2
    one_error_line(capsys, *needles)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("model_name", "needles"),
    [
        ("nowhere", ["model='nowhere'", "neither a folder", "ltx-video-13b"]),
        ("owner/name", ["model='owner/name'", "could not be fetched"]),
        ("ltx-video-2b", ["model='ltx-video-2b'", "without weights"]),
        (str(ROOT / "tests"), ["neither transformer/config.json"]),
    ],
)
def test_bad_models(tmp_path, capsys, model_name, needles):
    assert cli.main(["generate", "--model", model_name, "--prompt", "x", "--out", str(tmp_path / "c.mp4")]) == 2
    one_error_line(capsys, *needles)


def test_model_whose_weights_are_missing(model, tmp_path, capsys):
    (tmp_path / "m" / "transformer").mkdir(parents=True)
    config = Path(model, "transformer", "config.json").read_text()
    (tmp_path / "m" / "transformer" / "config.json").write_text(config)
    options = ["--model", str(tmp_path / "m"), "--stg-layers", "1"]
    assert cli.main(["generate", *options, "--prompt", "x", "--out", str(tmp_path / "c.mp4")]) == 2
    one_error_line(capsys, "cannot be loaded as a pipeline")


def test_unsupported_and_broken_configs(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "num_layers": 3}')
    assert cli.main(["plan", "--model", str(tmp_path), "--stg-layers", "1"]) == 2
    one_error_line(capsys, "FluxTransformer2DModel", "LTXVideoTransformer3DModel")
    (tmp_path / "config.json").write_text("{")
    assert cli.main(["plan", "--model", str(tmp_path), "--stg-layers", "1"]) == 2
    one_error_line(capsys, "cannot read")


def test_plan_needs_only_a_config(model, tmp_path, capsys):
    (tmp_path / "transformer").mkdir()
    config = Path(model, "transformer", "config.json").read_text()
    (tmp_path / "transformer" / "config.json").write_text(config)
    assert cli.main(["plan", "--model", str(tmp_path), "--stg-layers", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 blocks" in out
    assert "9 of 12 block-rows: 2.25 pass-equivalents" in out


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        ("--model ltx-video-2b", ["64 of 84 block-rows: 2.29", "junhahyung/STGuidance", "guidance scale 3"]),
        ("--model ltx-video-2b --guidance-scale 1", [", changed", "36 of 56 block-rows"]),
        ("--model ltx-video-2b --stg-layers 19 --stg-mode attention", ["65 of 84 block-rows"]),
        ("--model ltx-video-13b", ["schedule of 7 entries", "sigma 0.985", "116 of 144 block-rows"]),
        ("--model ltx-video-2b --stg-scale 0", ["no skip branch", "56 of 56 block-rows"]),
    ],
)
def test_plan_of_published_names(capsys, options, needles):
    assert cli.main(["plan", *options.split()]) == 0
    out = capsys.readouterr().out
    for needle in needles:
        assert needle in out


def test_what_a_schedule_sets_cannot_be_typed_beside_it(capsys):
    assert cli.main(["plan", "--model", "ltx-video-13b", "--stg-scale", "1"]) == 2
    one_error_line(capsys, "stg_scale=1.0 has no effect", "ltx-video-13b")


def test_env(capsys, monkeypatch):
    monkeypatch.setenv("STG_TEST_SWITCH", "on")
    monkeypatch.setenv("HF_HUB_TOKEN", "a-secret")
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    for needle in (
        stg_engine.__version__,
        torch.__version__,
        sys.version.split()[0],
        "STG_TEST_SWITCH=on",
        "attention",
    ):
        assert needle in out
    assert {"torch:", "diffusers:", "transformers:", "triton:", "xformers:", "cuda:", "driver:"} <= set(out.split())
    assert "a-secret" not in out


def test_generate_writes_clip_sheet_and_metadata(small, tmp_path, capsys):
    import av

    setting = ["--width", "64", "--seed", "3", "--fps", "12", "--stg-scale", "0.5", "--rescale", "0.7"]
    assert cli.main([*small, *setting]) == 0
    out = capsys.readouterr().out
    assert names(tmp_path) == ["clip.json", "clip.mp4", "clip.png"]
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = list(container.decode(video=0))
        assert container.streams.video[0].average_rate == 12
    assert (len(frames), frames[0].height, frames[0].width) == (9, 256, 512)
    with Image.open(tmp_path / "clip.png") as sheet:
        assert sheet.width > 9 * 256
        assert 128 < sheet.height < 256
    data = json.loads((tmp_path / "clip.json").read_text())
    assert data["plan"]["pass_equivalents"] == 2.25
    assert data["plan"]["text"] in out
    assert (data["prompt"], data["seed"], data["fps"], data["guidance_scale"]) == ("a red cat", 3, 12, 3.0)
    assert (data["height"], data["width"], data["frames"], data["steps"]) == (32, 64, 9, 2)
    assert (data["stg"]["layers"], data["stg"]["scale"], data["stg"]["rescale"]) == ([2], 0.5, 0.7)
    assert data["versions"]["torch"] == torch.__version__
    assert data["seconds"] > data["seconds_per_step"] > 0
    assert (data["mp4"], data["compare"]) == ({"height": 256, "width": 512}, None)


def test_the_clip_is_what_the_pipeline_gives(small, model, tmp_path, monkeypatch):
    from diffusers import LTXPipeline

    written = {}
    monkeypatch.setattr(
        media, "write_mp4", lambda path, frames, fps, audio: written.update(frames=frames) or path.touch() or (1, 1)
    )
    assert cli.main([*small, "--seed", "5"]) == 0
    pipe = LTXPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 3.0}
    with stg_engine.attach(pipe, STGConfig(layers=(2,))):
        frames = pipe("a red cat", generator=torch.Generator().manual_seed(5), output_type="np", **call).frames[0]
    assert np.abs(written["frames"].astype(int) - media.to_uint8(frames)).max() <= 1
    plain = pipe("a red cat", generator=torch.Generator().manual_seed(5), output_type="np", **call).frames[0]
    assert np.abs(written["frames"].astype(int) - media.to_uint8(plain)).max() > 4  # STG did change the clip


def test_compare_has_a_row_per_setting_and_times_plain_passes(small, tmp_path, capsys):
    assert cli.main([*small, "--compare"]) == 0
    out = capsys.readouterr().out
    data = json.loads((tmp_path / "clip.json").read_text())
    assert [run["label"] for run in data["runs"]] == ["no guidance", "CFG 3", "CFG 3 + STG 1\n(residual, layers 2)"]
    with Image.open(tmp_path / "clip.png") as sheet:
        assert 3 * 128 < sheet.height < 4 * 128
    assert data["compare"]["passes"] == 3
    assert data["compare"]["error"] <= 2 * data["compare"]["rounding"]
    assert data["compare"]["speedup"] > 0
    assert "3 plain passes" in out
    assert "engine against the faster" in out


def test_compare_without_cfg_is_two_passes(small, tmp_path):
    bitwise = ["--execution", "serial", "--kernels", "off"]
    assert cli.main([*small, "--compare", "--guidance-scale", "1", *bitwise]) == 0
    data = json.loads((tmp_path / "clip.json").read_text())
    assert [run["label"].split("\n")[0] for run in data["runs"]] == ["no guidance", "STG 1"]
    assert (data["compare"]["passes"], data["compare"]["error"]) == (2, 0.0)


def test_graph(small, tmp_path, capsys, monkeypatch):
    if not torch.cuda.is_available():
        assert cli.main([*small, "--graph"]) == 2
        assert "graph=True is not allowed on cpu" in capsys.readouterr().err
    monkeypatch.setattr(graphs, "CudaCapture", TapeCapture)
    assert cli.main([*small, "--graph", "--compare", "--device", "cpu"]) == 0
    data = json.loads((tmp_path / "clip.json").read_text())
    assert data["graph"] is True
    assert "graphs     1 captured, 1 replays" in data["report"]
    assert data["compare"]["error"] <= 2 * data["compare"]["rounding"]


def test_no_speed_up_is_stated_where_the_results_differ(small, tmp_path, capsys, monkeypatch):
    def wrong(transformer, config, *arguments, **options):
        return reference.three_passes(transformer, STGConfig(layers=(1,)), *arguments, **options)

    monkeypatch.setattr(compare, "three_passes", wrong)
    assert cli.main([*small, "--compare"]) == 0
    out, err = capsys.readouterr()
    assert "NOT EQUAL" in out
    assert "engine against" not in out
    assert "warning" in err
    assert json.loads((tmp_path / "clip.json").read_text())["compare"]["speedup"] is None


def test_scale_zero_is_the_plain_pipeline(small, tmp_path):
    assert cli.main([*small[: small.index("--stg-layers")], "--stg-scale", "0"]) == 0
    data = json.loads((tmp_path / "clip.json").read_text())
    assert (data["stg"], data["plan"]["pass_equivalents"]) == (None, 2.0)


@pytest.mark.parametrize("taken", ["clip.mp4", "clip.png", "clip.json"])
def test_nothing_is_overwritten_without_force(small, tmp_path, capsys, monkeypatch, taken):
    (tmp_path / taken).write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(generate, "find_model", lambda *_: pytest.fail("work began"))
        assert cli.main(small) == 2
    one_error_line(capsys, taken, "--force")
    assert names(tmp_path) == [taken]
    assert (tmp_path / taken).read_text() == "mine"


def test_force_overwrites(small, tmp_path):
    (tmp_path / "clip.json").write_text("mine")
    assert cli.main([*small, "--force"]) == 0
    assert json.loads((tmp_path / "clip.json").read_text())["seed"] == 0


def raises(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize(
    ("place", "error", "status", "needle"),
    [
        ("write_mp4", KeyboardInterrupt(), 130, "interrupted"),
        ("contact_sheet", OSError(28, "No space left on device"), 1, "No space left"),
        ("write_json", KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_interrupted_write_leaves_nothing(small, tmp_path, capsys, monkeypatch, place, error, status, needle):
    monkeypatch.setattr(media, place, raises(error))
    assert cli.main(small) == status
    one_error_line(capsys, needle)
    assert names(tmp_path) == []


def test_interrupted_generation(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusers.FlowMatchEulerDiscreteScheduler.step", raises(KeyboardInterrupt()))
    assert cli.main(small) == 130
    one_error_line(capsys, "interrupted")
    assert names(tmp_path) == []


def test_a_clip_of_nan_is_an_error(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "diffusers.AutoencoderKLLTXVideo.decode", lambda *_, **__: (torch.full((1, 3, 9, 32, 32), torch.nan),)
    )
    assert cli.main(small) == 1
    one_error_line(capsys, "NaN", "9 of 9 frames")
    assert names(tmp_path) == []


def test_debug_shows_the_traceback(model):
    with pytest.raises(ValueError, match="0 to 3"):
        cli.main(["plan", "--debug", "--model", model, "--stg-layers", "9"])


def test_warnings_name_unknown_words_and_useless_negative_prompts(small, capsys, model, monkeypatch):
    monkeypatch.setattr("stg_engine.demo.model_path", lambda: Path(model))
    arguments = [*small, "--prompt", "a Žluť cat", "--negative-prompt", "dog", "--guidance-scale", "1"]
    assert cli.main(arguments) == 0
    err = capsys.readouterr().err
    assert "stg-engine: warning: the negative prompt has no effect" in err
    assert "does not know 'Žluť'; it knows: a, b, c" in err


def test_help_and_errors_are_fast_and_light():
    watch = "import sys; from stg_engine.cli import main; code = main(['plan', '--stg-mode']); "
    done = subprocess.run(
        [sys.executable, "-c", watch + "print(code, 'torch' in sys.modules, 'diffusers' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["2", "False", "False"]
    done = subprocess.run(
        [sys.executable, "-m", "stg_engine", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "{generate,plan,bench,sweep,env}" in done.stdout


TELL_WHEN_STEPPING = """
import signal, sys, diffusers
from stg_engine.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
scheduler = diffusers.FlowMatchEulerDiscreteScheduler
step = scheduler.step
scheduler.step = lambda *args, **kwargs: (print("stepping", flush=True), step(*args, **kwargs))[1]
sys.exit(main())
"""


def test_ctrl_c_in_a_real_process(small, tmp_path):
    command = [sys.executable, "-c", TELL_WHEN_STEPPING, *small, "--steps", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "stepping\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("stg-engine: error: interrupted; nothing was written\n")
    assert "Traceback" not in err
    assert names(tmp_path) == []


@pytest.mark.parametrize("one_batch", [False, True])
@pytest.mark.parametrize("mode", ["residual", "attention"])
def test_three_passes_against_the_formula(one_batch, mode):
    """The reference against blocks taken out or attention replaced by hand."""
    transformer = tiny_transformer()
    shared, cond, uncond = tiny_inputs(videos=2)
    config = STGConfig(layers=(2,), scale=1.5, mode=mode, rescale=0.6, extra_skips=(Skip((1, 3), 0.5),))

    def predict(inputs):
        return transformer(**shared, **inputs, return_dict=False)[0]

    with torch.no_grad():
        result = reference.three_passes(transformer, config, shared, cond, uncond, 4.0, one_batch=one_batch)
        c, u = predict(cond), predict(uncond)
        blocks = transformer.transformer_blocks
        if mode == "residual":
            transformer.transformer_blocks = torch.nn.ModuleList(blocks[i] for i in (0, 1, 3))
            weak = predict(cond)
        else:
            attention = blocks[2].attn1
            attention.forward = lambda hidden_states, **_: attention.to_out[0](attention.to_v(hidden_states))
            weak = predict(cond)
            del attention.forward
        transformer.transformer_blocks = torch.nn.ModuleList(blocks[i] for i in (0, 2))
        weaker = predict(cond)
    expected = u + 4.0 * (c - u) + 1.5 * (c - weak) + 0.5 * (c - weaker)
    for video in range(2):
        factor = c[video].std() / expected[video].std()
        expected[video] *= 0.6 * factor + 0.4
    assert (c - weak).abs().max() > 0.05
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_three_passes_refuses_a_hooked_transformer():
    transformer = tiny_transformer()
    shared, cond, uncond = tiny_inputs()
    config = STGConfig(layers=(1,))
    with stg_engine.Denoiser(transformer, config), pytest.raises(ValueError, match="detach"):
        reference.three_passes(transformer, config, shared, cond, uncond, 3.0)
