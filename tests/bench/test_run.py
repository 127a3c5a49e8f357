"""What becomes a row: the gate, the oracle, variants that fail, and the numbers of a row."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from statistics import median

import pytest
import torch
from bench.tiny_case import install, tiny_case
from engine.tiny import tiny_inputs, tiny_transformer
from models.families import ltx2, wan

from stg_engine import Denoiser, guidance
from stg_engine.bench import gate, passes, run, timing, variants
from stg_engine.bench.case import Step, Variant
from stg_engine.bench.passes import wide_weights
from stg_engine.reference import three_passes

CPU = torch.device("cpu")
ENGINES = ("engine-unshared", "engine-shared", "engine-kernels", "engine", "engine-serial")
PLAIN = ("cfg", "batched-passes", "sequential-passes")


@pytest.fixture
def case(monkeypatch):
    return install(monkeypatch)


def measure(case, *names, dtype=torch.float32, ways=None, **options):
    ways = variants.find(names or (*PLAIN, *ENGINES)) if ways is None else ways
    options = {"run": "a", "repeats": 2, "warmup_seconds": 0, **options}
    return run.measure(case, ways, CPU, dtype, **options)


def made_up(name, change=lambda step: step, is_exact=True):
    """Batched passes, with their `Step` changed."""

    @contextmanager
    def prepare(case, transformer, inputs):
        with passes.one_batch(case, transformer, inputs) as step:
            yield change(step)

    return Variant(name, name, is_exact, lambda case, device: "", prepare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_variant_that_the_cpu_has_passes_the_gate(case, dtype):
    measured = measure(case, dtype=dtype)
    assert [row.variant for row in measured.rows] == [*PLAIN, *ENGINES]
    assert measured.red == []
    assert measured.without == {}
    for row in measured.rows:
        assert 0 < row.error <= row.budget
        assert 0 < row.delta_error <= row.delta_budget
        assert row.dtype == str(dtype).removeprefix("torch.")
        assert 0 < row.low <= row.seconds <= row.high
        assert row.samples == 2
        assert row.cold_seconds > 0
        assert (row.peak_bytes, row.launches) == (None, None)
    rows = {row.variant: row for row in measured.rows}
    assert {name: row.block_rows for name, row in rows.items()} == {
        "cfg": 8,
        "batched-passes": 12,
        "sequential-passes": 12,
        "engine-unshared": 11,
        **dict.fromkeys(ENGINES[1:], 9),
    }
    assert rows["engine"].bound == 11 / 9
    assert rows["sequential-passes"].moved_bytes > rows["batched-passes"].moved_bytes
    assert rows["engine"].gemm_flops < rows["engine-unshared"].gemm_flops < rows["batched-passes"].gemm_flops
    assert rows["engine"].ideal_seconds == pytest.approx(
        rows["engine"].gemm_flops / 1e11 + rows["engine"].attention_flops / 5e10 + rows["engine"].moved_bytes / 1e10
    )
    assert rows["engine-shared"].kernels == "modules as they are: kernels='off'"
    assert rows["batched-passes"].attention == "diffusers native"


@pytest.mark.parametrize(
    "config",
    [
        {"mode": "attention"},
        {"rescale": 0.7, "extra_skips": (replace(tiny_case().config.skips[0], layers=(1, 3)),)},
        {"weak_pass": "negative_prompt", "start": 0.3},
        {"weak_pass": "uncond"},
    ],
    ids=lambda config: ",".join(config),
)
def test_other_guidance(case, config):
    measured = measure(tiny_case(**config), "cfg", "batched-passes", "sequential-passes", "engine-shared")
    assert measured.red == []
    assert ("cfg" in measured.without) == (config.get("weak_pass") == "uncond")
    assert len(measured.rows) + len(measured.without) == 4


def test_without_cfg(case):
    measured = measure(tiny_case(guidance_scale=None), "cfg", "batched-passes", "engine")
    assert measured.without == {"cfg": "the case has no CFG"}
    assert [(row.variant, row.block_rows) for row in measured.rows] == [("batched-passes", 8), ("engine", 5)]


@pytest.mark.parametrize("one_batch", [True, False])
@torch.no_grad()
def test_plain_steps_are_the_three_passes(one_batch):
    case = tiny_case(rescale=0.7)
    model, inputs = tiny_transformer(), tiny_inputs()
    expected = three_passes(model, case.config, *inputs, 3.0, one_batch=one_batch)
    with (passes.one_batch if one_batch else passes.one_by_one)(case, model, inputs) as step:
        assert torch.equal(step.guided(), expected)
        assert torch.equal(step.guided(), expected)
    assert not any(block._forward_hooks for block in model.transformer_blocks)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact, _ = passes.exact_steps(case, model, inputs, torch.float32)
    assert exact.guided[0].dtype == torch.float64
    assert 0 < gate.distance(expected, exact.guided[0]) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_oracle_gives_the_weights_back_bit_for_bit():
    model = wan.model(torch.bfloat16)  # norms and tables stay in float32
    model.register_buffer("more", torch.arange(5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert {value.dtype for value in before.values()} == {torch.bfloat16, torch.float32, torch.int64}
    with wide_weights(model, torch.float32):
        assert {value.dtype for value in model.parameters()} == {torch.float32}
        assert model.more.dtype == torch.int64
    with pytest.raises(KeyboardInterrupt), wide_weights(model, torch.float32):
        raise KeyboardInterrupt
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name


def test_twins_share_weights_and_nothing_else():
    model = tiny_transformer()
    twin = passes.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    with Denoiser(twin, tiny_case().config):
        assert not hasattr(model.transformer_blocks[0], "_diffusers_hook")
    processors = [m.transformer_blocks[0].attn1.processor for m in (model, twin)]
    assert processors[0] is not processors[1]


def test_a_wrong_combination_makes_the_gate_refuse_the_engine_alone(case, monkeypatch):
    combine = guidance.combine
    monkeypatch.setattr(guidance, "combine", lambda *a, **k: 1.01 * combine(*a, **k))
    measured = measure(case, *PLAIN, "engine-unshared", "engine-shared")
    assert [row.variant for row in measured.rows] == [*PLAIN]
    assert list(measured.without) == ["engine-unshared", "engine-shared"]
    for name, red in zip(measured.without, measured.red, strict=True):
        assert red.startswith(f"{name} of tiny: PARITY GATE RED: error of output 0 1.0")
        assert "allowed" in red


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda b: {**b, "skip": b["cond"] + 1.01 * (b["skip"] - b["cond"])}, "error of c - p 1.0"),
        (lambda b: {**b, "skip": b["skip"] * float("nan")}, "error of c - p inf"),
    ],
    ids=["delta", "nan delta"],
)
def test_a_wrong_delta_is_red_though_guided_is_right(case, wrong, message):
    broken = made_up("broken", lambda step: replace(step, branches=lambda: wrong(step.branches())))
    measured = measure(case, ways=[*variants.find(["batched-passes"]), broken])
    assert [row.variant for row in measured.rows] == ["batched-passes"]
    assert message in measured.red[0]


@pytest.mark.parametrize("is_exact", [True, False])
def test_nan_is_red_for_lossy_variants_too(case, is_exact):
    broken = made_up("broken", lambda step: replace(step, guided=lambda: step.guided() * float("nan")), is_exact)
    measured = measure(case, ways=[broken])
    assert measured.rows == []
    assert "error of output 0 inf" in measured.without["broken"]


def test_a_lossy_variant_has_errors_and_no_budget(case):
    lossy = made_up("lossy", lambda step: replace(step, guided=lambda: 1.01 * step.guided()), is_exact=False)
    (row,) = measure(case, ways=[lossy]).rows
    assert row.error == pytest.approx(0.01, rel=0.01)
    assert (row.budget, row.delta_budget, row.is_exact) == (None, None, False)


def test_a_result_that_goes_wrong_later_is_red(case):
    numbers = count()

    def change(step):
        return replace(step, guided=lambda: step.guided() * (1.01 if next(numbers) > 3 else 1))

    measured = measure(case, ways=[made_up("stale", change), *variants.find(["engine"])])
    assert [row.variant for row in measured.rows] == ["engine"]
    assert "PARITY GATE RED" in measured.without["stale"]


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_result_that_is_kept_is_red(case, is_exact):
    def change(step):
        kept = []

        def guided():
            kept.append(step.guided() if not kept else kept[0])
            return kept[0]

        return replace(step, guided=guided)

    measured = measure(case, ways=[made_up("kept", change, is_exact), *variants.find(["cfg", "engine"])])
    assert [row.variant for row in measured.rows] == ["cfg", "engine"]
    assert measured.without["kept"] == "PARITY GATE RED: output 0 does not follow the latents"


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda x: x.double(), "output 0 is torch.float64"), (lambda x: x[..., None], "error of output 0 inf")],
    ids=["dtype", "shape"],
)
def test_another_dtype_or_shape_is_red(case, change, message):
    wrong = made_up("wrong", lambda step: replace(step, guided=lambda: change(step.guided())))
    assert message in measure(case, ways=[wrong]).without["wrong"]


@pytest.mark.parametrize("mode", ["residual", "attention"])
def test_compiled_passes_skip_what_eager_ones_skip(case, monkeypatch, mode):
    compiled, compile = [], torch.compile

    def by_eager(function, mode):
        compiled.append((function.__qualname__, mode))
        return compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", by_eager)
    (row,) = measure(tiny_case(mode=mode), "compiled-passes").rows
    assert compiled == [("LTXVideoTransformerBlock.forward", None)]
    assert row.kernels == f"modules, torch.compile (default) in {4 if mode == 'residual' else 3} blocks"
    assert (row.block_rows, row.attention) == (12, "diffusers native")


def test_compiled_passes_of_two_outputs(case, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: compile(function, backend="eager"))
    inputs = partial(ltx2.inputs, "LTX-2", 1)
    config = {"mode": "attention", "modality_scale": 3.0}
    two = replace(
        tiny_case(**config),
        build=lambda: ltx2.model("LTX-2", torch.get_default_dtype()),
        inputs=lambda device, dtype: inputs(dtype),
    )
    measured = measure(two, "batched-passes", "compiled-passes", "sequential-passes", "engine")
    assert measured.red == []
    assert [row.block_rows for row in measured.rows] == [16, 16, 16, 14]


def test_nothing_is_judged_without_a_budget(case):
    silent = tiny_case(layers=(2,))

    def build():
        model = tiny_transformer()
        for parameter in model.transformer_blocks[2].parameters():
            parameter.data.zero_()
        return model

    with pytest.raises(RuntimeError, match="plain passes give no budget"):
        measure(replace(silent, build=build), "engine")


@pytest.mark.parametrize(
    ("error", "why", "is_red"),
    [(torch.OutOfMemoryError("CUDA"), "out of memory", False), (OSError("no compiler"), "OSError: no compiler", True)],
)
@pytest.mark.parametrize("call", [1, 5])  # the first one; while samples are taken
def test_others_go_on_where_one_raises(case, error, why, is_red, call):
    numbers = count(1)

    def change(step):
        def guided():
            if next(numbers) == call:
                raise error
            return step.guided()

        return replace(step, guided=guided)

    measured = measure(case, ways=[made_up("broken", change), *variants.find(["engine"])], repeats=3)
    assert [(row.variant, row.samples) for row in measured.rows] == [("engine", 3)]
    assert measured.without == {"broken": why}
    assert bool(measured.red) == is_red


def test_what_stands_open_is_closed_and_the_environment_as_before(case, monkeypatch, tmp_path):
    closed = []

    @contextmanager
    def prepare(case, transformer, inputs):
        with passes.one_batch(case, transformer, inputs) as step:
            yield step
        closed.append(True)

    monkeypatch.setenv("STG_ATTENTION_CACHE", str(tmp_path / "kept.json"))
    way = Variant("own", "own", True, lambda case, device: "", prepare)
    measure(case, ways=[way, *variants.find(["engine"])])
    assert closed == [True]
    assert variants.os.environ["STG_ATTENTION_CACHE"] == str(tmp_path / "kept.json")
    assert list(tmp_path.iterdir()) == []
    assert torch.get_default_dtype() == torch.float32


def test_compiled_code_of_other_runs_makes_no_first_call_warm(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with run._surroundings([]):
        assert variants.os.environ["TORCHINDUCTOR_CACHE_DIR"] != str(tmp_path)
    assert variants.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_progress_and_samples(case):
    said = []
    measured = measure(case, "batched-passes", "engine", repeats=5, progress=said.append)
    assert len(said) == run.steps_of_progress(2, 5)
    assert said[:5] == [
        "tiny: weights",
        "tiny: exact step",
        "tiny: ceilings",
        "tiny: first call of batched-passes",
        "tiny: first call of engine",
    ]
    assert {row.samples for row in measured.rows} == {5}


def test_the_row_is_of_the_samples(case, monkeypatch):
    samples = [4.0, 1.0, 3.0, 2.0, 5.0]
    monkeypatch.setattr(timing, "interleaved", lambda functions, *_, **__: dict.fromkeys(functions, samples))
    (row,) = measure(case, "batched-passes").rows
    assert (row.low, row.seconds, row.high) == (1.5, median(samples), 4.5)


def test_a_config_that_needs_a_sigma_is_refused(case):
    with pytest.raises(ValueError, match="sigma"):
        measure(tiny_case(space="x0", rescale=0.5), "engine")


def test_delta_of_several_branches():
    c, u, p, q = torch.randn(4, 2, 3)
    assert torch.equal(gate.delta({"cond": c, "uncond": u}), (c.double() - u.double())[None])
    both = torch.stack([c.double() - p.double(), c.double() - q.double()])
    assert torch.equal(gate.delta({"uncond": u, "cond": c, "skip": p, "skip2": q}), both)


def test_steps_of_two_outputs_are_gated_by_each():
    def step(*outputs):
        branches = {"cond": torch.ones(2), "skip": torch.tensor([0.0, 1e-3])}
        return Step(lambda: outputs, lambda: branches, None, lambda: ("", ""))

    video, audio = torch.tensor([1.0, 2.0]), torch.tensor([1e-3, 0.0])
    exact = passes.Exact((video.double(), audio.double()), step().branches())
    exact.branches["skip"] = exact.branches["skip"].double() + 1e-7
    judge = gate.Gate.of(exact, step(video * (1 + 1e-6), audio * (1 + 1e-6)))
    judge.check(step(video, audio * (1 + 1e-6)))
    with pytest.raises(gate.GateFailure, match=r"error of output 1 1\.0"):
        judge.check(step(video, audio * 1.01))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["residual", "attention"])
def test_all_variants_on_a_gpu(case, mode):
    device = torch.device("cuda")

    def inputs(_, dtype):
        groups = tiny_inputs(dtype=dtype)
        return tuple({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in g.items()} for g in groups)

    on_gpu = replace(tiny_case(mode=mode), inputs=inputs, build=lambda: tiny_transformer(dtype=torch.bfloat16).cuda())
    measured = run.measure(on_gpu, variants.default(device), device, torch.bfloat16, run="a", repeats=3)
    assert measured.red == []
    assert {row.variant for row in measured.rows} | set(measured.without) == set(variants.VARIANTS)
    for row in measured.rows:
        assert row.peak_bytes > 0
        assert row.launches > 0
