"""`stg-engine sweep`: what its rows hold, on the shipped model and on tiny ones, and what it refuses."""

import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from engine.tiny import tiny_inputs, tiny_pipeline, tiny_transformer
from models.pipelines import wan
from PIL import Image

from stg_engine import cli, generate
from stg_engine.bench import cases, layers, sweep_output
from stg_engine.bench.case import Case
from stg_engine.bench.record import append, read
from stg_engine.bench.sweep import SweepRow, parse_layers, quality
from stg_engine.config import STGConfig
from stg_engine.demo.evaluate import captions_of, score
from stg_engine.demo.evaluate import generate as generate_clips
from stg_engine.denoiser import Denoiser
from stg_engine.plan import Plan
from stg_engine.settings import Setting, find_model

SHIPPED = ["sweep", "--layers", "6,0", "--clips", "2", "--steps", "2"]
JUDGED = ["all", "shape", "color", "direction", "background", "iou", "edge", "stray"]


def norms(x: torch.Tensor) -> float:
    return x.double().norm().item()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> tuple[Path, str]:
    """Folder with sweep.csv and sweep.png of two layers of the shipped model, and what was printed."""
    folder = tmp_path_factory.mktemp("sweep")
    files = ["--out", str(folder / "sweep.csv"), "--plot", str(folder / "sweep.png")]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(layers, "SAMPLES", 3)
        patch.setattr("stg_engine.bench.sweep.SHIPPED_PROMPTS", 2)
        patch.setattr("builtins.print", lambda *values, **_: printed.append(" ".join(map(str, values))))
        assert cli.main([*SHIPPED, *files]) == 0
    return folder, "\n".join(printed)


@pytest.fixture(scope="module")
def rows(shipped) -> dict[str, SweepRow]:
    return {row.name: row for row in read(shipped[0] / "sweep.csv", SweepRow)}


@pytest.fixture(scope="module")
def pipe():
    return generate.load_pipeline(find_model(None), torch.device("cpu"), torch.float32)


def test_rows_are_in_order_and_whole(rows):
    assert list(rows) == ["CFG alone", "no guidance", "layer 0", "layer 6"]
    assert [row.layer for row in rows.values()] == [None, None, 0, 6]
    assert {(row.model, row.weights, row.blocks, row.clips, row.steps) for row in rows.values()} == {
        ("shipped", "trained", 12, 2, 2)
    }
    for name, row in rows.items():
        assert all(getattr(row, field) is not None for field in JUDGED), name
        assert all(getattr(row, f"{field}_error") is not None for field in JUDGED), name
        assert (row.delta is None) == (row.delta_of_cfg is None) == (row.layer is None)
        assert (row.all_gain is None) == (name == "CFG alone")
        assert 0 < row.low <= row.seconds <= row.high
        assert row.samples == 2 * 2  # noise levels, prompts
    assert rows["CFG alone"].of_cfg == rows["CFG alone"].of_cfg_high == 1.0
    assert rows["no guidance"].of_cfg < 1.0
    assert rows["layer 0"].seconds > rows["no guidance"].seconds


def test_cost_is_the_plans(rows):
    options = find_model(None).spec.plan_options(is_on=True)
    for layer in (0, 6):
        plan = Plan.build(STGConfig(layers=(layer,)), 12, **options)
        row = rows[f"layer {layer}"]
        assert (row.block_rows, row.pass_equivalents) == (plan.block_rows, pytest.approx(plan.pass_equivalents, 1e-5))
    assert [rows[name].pass_equivalents for name in ("CFG alone", "no guidance")] == [2.0, 1.0]


def test_delta_is_that_of_the_branches_on_the_runs_noise_levels(rows, pipe):
    sizes = dict.fromkeys(("frames", "height", "width", "fps"))
    call = generate.clip_arguments({**sizes, "steps": 2}, find_model(None), pipe)
    captions = [spec.caption for spec in captions_of(2, seed=0)]
    steps = layers.steps_of_run(pipe, Setting(None, 3.0, None), call, captions)
    assert [len(step.shared["hidden_states"]) for step in steps] == [1] * 4
    assert [step.shared["timestep"].flatten()[0].item() for step in steps[:2]] == pipe.scheduler.timesteps.tolist()
    for layer in (0, 6):
        deltas, of_cfg = [], []
        with torch.no_grad(), Denoiser(pipe.transformer, STGConfig(layers=(layer,))) as denoiser:
            for step in steps:
                branches = denoiser.branches(step.shared, step.cond, step.uncond)
                c, u, p = (branches[name] for name in ("cond", "uncond", "skip"))
                deltas.append(norms(c - p) / norms(c))
                of_cfg.append(norms(c - p) / norms(c - u))
        row = rows[f"layer {layer}"]
        assert row.delta == pytest.approx(sum(deltas) / len(deltas), rel=1e-4)
        assert (row.delta_low, row.delta_high) == pytest.approx((min(deltas), max(deltas)), rel=1e-4)
        assert row.delta_of_cfg == pytest.approx(sum(of_cfg) / len(of_cfg), rel=1e-4)


def test_clips_are_those_of_the_demos_evaluation(rows, pipe):
    specs = captions_of(2, seed=0)
    values = {}
    for name, config in {"CFG alone": None, "layer 6": STGConfig(layers=(6,))}.items():
        clips = generate_clips(pipe, specs, guidance_scale=3.0, config=config, steps=2, progress=False)
        whole = score(clips, specs)
        row = rows[name]
        assert [row.all, row.shape, row.color, row.direction, row.background] == [
            whole.parts[part] for part in ("all", "shape", "color", "direction", "background")
        ]
        assert (row.iou, row.edge, row.stray) == pytest.approx((whole.iou, whole.edge, whole.stray), rel=1e-4)
        values[name] = torch.tensor([score(clips[i : i + 1], specs[i : i + 1]).edge for i in range(2)])
    gains = values["layer 6"] - values["CFG alone"]
    assert rows["layer 6"].edge_gain == pytest.approx(gains.mean().item(), rel=1e-3)
    assert rows["layer 6"].edge_gain_error == pytest.approx(gains.std().item() / math.sqrt(2), rel=1e-3)


def test_what_is_printed(shipped, rows):
    printed = shipped[1]
    assert sweep_output.table(list(rows.values())) in printed
    assert "shipped, 12 layers: residual skip at scale 1, CFG 3, 2 clips of 2 steps" in printed
    names = [line.split("  ")[0] for line in printed.splitlines()]
    assert names[names.index("CFG alone") + 1] == "no guidance"
    assert "below two are noise" in printed
    assert "random" not in printed


def test_picture_is_drawn_from_the_csv_alone(shipped, rows, tmp_path):
    png = shipped[0] / "sweep.png"
    assert Image.open(png).format == "PNG"
    changed = [replace(row, edge_gain=(row.edge_gain or 0) + row.blocks * (row.layer or 0)) for row in rows.values()]
    for name, written in (("same", list(rows.values())), ("other", changed)):
        append(tmp_path / f"{name}.csv", written)
        sweep_output.plot(tmp_path / f"{name}.csv", tmp_path / f"{name}.png")
    assert (tmp_path / "same.png").read_bytes() == png.read_bytes()
    assert (tmp_path / "other.png").read_bytes() != png.read_bytes()


# Tiny models.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny_pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture
def tiny(folder, tmp_path, monkeypatch) -> list[str]:
    """Arguments of a sweep of a pipeline with 4 blocks into tmp_path/sweep.csv."""
    monkeypatch.setattr(layers, "SAMPLES", 2)
    run = ["sweep", "--model", folder, "--prompt", "a red cat", "--out", str(tmp_path / "sweep.csv")]
    return [*run, "--height", "32", "--width", "32", "--frames", "9", "--steps", "2"]


@pytest.fixture
def case(monkeypatch) -> Case:
    """A case with 4 blocks by the name "tiny-case"."""

    def inputs(device, dtype):
        return tiny_inputs(videos=1, dtype=dtype)

    config = STGConfig(layers=(1,), scale=0.5, mode="attention")
    tiny = Case("tiny-case", "Tiny", "cpu", 12, config, 3.0, tiny_transformer, inputs)
    monkeypatch.setitem(cases.CASES, tiny.name, tiny)
    monkeypatch.setattr(layers, "SAMPLES", 2)
    return tiny


def test_pipeline_has_cost_and_delta_and_no_captions(tiny, tmp_path, capsys):
    assert cli.main([*tiny, "--mode", "attention", "--stg-scale", "2", "--plot", str(tmp_path / "sweep.png")]) == 0
    rows = read(tmp_path / "sweep.csv", SweepRow)
    assert [row.name for row in rows] == ["CFG alone", "no guidance", *(f"layer {k}" for k in range(4))]
    assert {(row.mode, row.stg_scale) for row in rows[2:]} == {("attention", 2.0)}
    assert all(row.delta > 0 and row.delta_of_cfg > 0 for row in rows[2:])
    judged = [field.name for field in fields(SweepRow) if field.name.split("_")[0] in JUDGED]
    assert len(judged) == 8 * 2 + 4 * 2
    assert {asdict(row)[name] for row in rows for name in (*judged, "clips", "steps")} == {None}
    out = capsys.readouterr().out
    assert "Only clips say which layer is best" in out
    assert "as good" not in out
    assert Image.open(tmp_path / "sweep.png").format == "PNG"


def test_pipeline_without_cfg(tiny, tmp_path, capsys):
    assert cli.main([*tiny, "--layers", "1-2", "--guidance-scale", "1"]) == 0
    rows = read(tmp_path / "sweep.csv", SweepRow)
    assert [row.name for row in rows] == ["no guidance", "layer 1", "layer 2"]
    assert [row.pass_equivalents for row in rows] == [1.0, 1 + 2 / 4, 1 + 1 / 4]
    assert all(row.delta > 0 and row.delta_of_cfg is None for row in rows[1:])
    assert "no CFG" in capsys.readouterr().out


def test_every_transformer_of_a_pipeline_is_measured(monkeypatch):
    monkeypatch.setattr(layers, "SAMPLES", 1)
    pipe = next(case for case in wan.CASES if case.name == "WanPipeline 2.2").build()
    setting, call = Setting(None, 5.0, None), {"num_inference_steps": 3, "height": 32, "width": 32, "num_frames": 9}
    steps = layers.steps_of_run(pipe, setting, call, ["a red cat"])
    assert [step.transformer for step in steps] == [pipe.transformer, pipe.transformer_2, pipe.transformer_2]
    assert all(step.uncond is not None for step in steps)
    guidances = {"layer 1": STGConfig(layers=(1,)).at()}
    *_, results = layers.measure(steps, STGConfig(layers=(0,)), guidances)
    expected = []
    for step in steps:
        with torch.no_grad(), Denoiser(step.transformer, STGConfig(layers=(1,))) as denoiser:
            branches = denoiser.branches(step.shared, step.cond, step.uncond)
            expected.append(norms(branches["cond"] - branches["skip"]) / norms(branches["cond"]))
    assert results["layer 1"].delta == pytest.approx(expected, rel=1e-5)


def test_case_has_random_weights_and_its_own_setting(case, tmp_path, capsys):
    out = tmp_path / "sweep.csv"
    assert cli.main(["sweep", "--model", "tiny-case", "--layers", "3,1", "--out", str(out)]) == 0
    rows = read(out, SweepRow)
    assert [(row.name, row.mode, row.stg_scale) for row in rows[2:]] == [
        ("layer 1", "attention", 0.5),
        ("layer 3", "attention", 0.5),
    ]
    assert {row.weights for row in rows} == {"random"}
    with torch.no_grad(), Denoiser(tiny_transformer(), STGConfig(layers=(3,), mode="attention")) as denoiser:
        shared, cond, uncond = tiny_inputs(videos=1)
        branches = denoiser.branches(shared, cond, uncond)
        delta = norms(branches["cond"] - branches["skip"]) / norms(branches["cond"])
    assert rows[3].delta == pytest.approx(delta, rel=1e-4)
    assert "Weights are random: cost is that of the architecture" in capsys.readouterr().out


@pytest.mark.parametrize("done", [0, 3])
def test_interrupt_leaves_whole_rows(done, pipe, tmp_path, capsys, monkeypatch):
    before = "an older file\n"
    out = tmp_path / "sweep.csv"
    out.write_text(before)
    calls = []

    def judge(*arguments):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(arguments)
        return {name: torch.rand(2, dtype=torch.float64) for name in JUDGED}

    monkeypatch.setattr(layers, "judge", judge)
    monkeypatch.setattr(generate, "load_pipeline", lambda *_: pipe)
    monkeypatch.setattr(layers, "SAMPLES", 1)
    monkeypatch.setattr("stg_engine.bench.sweep.SHIPPED_PROMPTS", 1)
    picture = ["--plot", str(tmp_path / "sweep.png")]
    assert cli.main([*SHIPPED, "--steps", "1", "--out", str(out), "--force", *picture]) == 130
    if done:
        assert [row.name for row in read(out, SweepRow)] == ["CFG alone", "no guidance", "layer 0"]
    else:
        assert out.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.csv"]
    error = capsys.readouterr().err
    assert (f"interrupted; 3 of 4 rows are in {out}" if done else "interrupted; nothing was written") in error


BAD = [
    ("--layers 4", "layers='4'", "outside 0 to 3"),
    ("--layers 3-9", "layers='3-9'", "outside 0 to 3"),
    ("--layers 3-1", "layers='3-1'", "empty"),
    ("--layers 1,x", "layers='1,x'", "such as 0-9 or 3,5"),
    ("--mode r", "mode='r'", "'residual', 'attention'"),
    ("--axis spatial", "axis='spatial'", "no factorised attention"),
    ("--stg-scale 0", "stg_scale=0.0", "nothing to sweep"),
    ("--stg-scale -1", "scale=-1.0", "at least 0"),
    ("--guidance-scale -1", "guidance_scale=-1.0", "at least 0"),
    ("--clips 4", "clips=4 has no effect", "only the shipped model"),
    ("--steps 0", "steps=0", "at least 1"),
    ("--prompt=", "prompt=''", "say what the clip shows"),
    ("--device toaster", "device='toaster'", "cpu"),
    ("--out sweep.txt", "out='sweep.txt'", ".csv"),
    ("--out no/such/sweep.csv", "out: the folder", "does not exist"),
    ("--plot sweep.pdf", "plot='sweep.pdf'", ".png"),
    ("--plot no/such/sweep.png", "plot: the folder", "does not exist"),
    ("--model nowhere", "model='nowhere'", "neither a folder"),
    ("--model tiny-case", "prompt='a red cat' has no effect", "inputs of its own"),
]


@pytest.mark.parametrize(
    ("options", "needles"),
    [(text, needles) for text, *needles in BAD],
    ids=[text for text, *_ in BAD],
)
def test_bad_requests_end_before_anything_is_loaded(tiny, case, tmp_path, capsys, monkeypatch, options, needles):
    monkeypatch.setattr(generate, "load_pipeline", lambda *_: pytest.fail("loaded"))
    assert cli.main([*tiny, *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for needle in needles:
        assert needle in err
    assert not (tmp_path / "sweep.csv").exists()


def test_matplotlib_is_asked_for_before_the_run(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(generate, "load_pipeline", lambda *_: pytest.fail("loaded"))
    assert cli.main([*tiny, "--plot", str(tmp_path / "sweep.png")]) == 2
    assert "needs matplotlib, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "sweep.csv").exists()


def test_shares_have_errors_that_know_how_few_clips_there_are():
    holds, seen = torch.ones(12), torch.tensor([0.5, math.nan, 0.7] * 4)
    cells = quality({"all": holds, "iou": seen}, {"all": torch.zeros(12), "iou": torch.full((12,), 0.5)})
    q = 14 / 16
    assert cells["all_error"] == pytest.approx(math.sqrt(q * (1 - q) / 16))
    assert (cells["all_gain"], cells["all_gain_error"]) == (1.0, 0.0)
    assert cells["iou"] == pytest.approx(0.6)
    assert cells["iou_gain"] == pytest.approx(0.1)
    assert cells["iou_error"] == pytest.approx(seen[~seen.isnan()].std().item() / math.sqrt(8))
    assert "shape" not in quality({"shape": torch.full((2,), math.nan)}, None)


def test_verdicts(rows):
    errors = {"edge_gain_error": 0.01, "iou_gain_error": 0.01, "all_gain_error": 0.1, "stray_gain_error": 0.1}

    def layer(number: int, edge: float, **changed: float) -> SweepRow:
        gains = {"edge_gain": edge, "iou_gain": 0.0, "all_gain": 0.0, "stray_gain": 0.0, **errors, **changed}
        return replace(rows["layer 6"], name=f"layer {number}", layer=number, **gains)

    written = [
        rows["CFG alone"],
        layer(0, 0.5, all_gain=-0.3),
        layer(1, 0.4, iou_gain=-0.03, stray_gain=0.3),
        layer(2, 0.09),
        layer(3, 0.1, all_gain=-0.1, iou_gain=-0.01, stray_gain=0.1),
        layer(4, 0.05),
        layer(5, 0.01),
    ]
    found = {"layer 0": "worse: captions", "layer 1": "worse: overlap, stray", "layer 2": "as good", "layer 3": "best"}
    assert sweep_output.verdicts(written) == {**found, "layer 4": "", "layer 5": ""}
    assert [row.layer for row in sweep_output.ranked(written)] == [None, 3, 2, 4, 5, 0, 1]
    assert sweep_output.verdicts([replace(row, clips=None) for row in written]) == {}


def test_layers():
    assert parse_layers("all", 3) == [0, 1, 2]
    assert parse_layers("2,0-1,1", 3) == [0, 1, 2]
    assert parse_layers("2", 3) == [2]


@pytest.mark.parametrize("name", ["all", "overlap", "edge", "stray"])
def test_every_column_of_judged_clips_is_explained(name):
    assert re.search(rf"\b{name}: \w+", sweep_output.JUDGED)
