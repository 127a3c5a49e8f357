"""Graphs, with tapes in their place: what is captured when, and that a replay's result is the eager one's."""

import gc
import os
import subprocess
import sys
import weakref
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from engine.tape import TapeCapture
from engine.tiny import tiny_inputs, tiny_transformer
from models import ltx2_pipes
from models.case import cases, relative_error
from models.pipeline_case import pipeline_cases
from peft import LoraConfig

import stg_engine
from stg_engine import Denoiser, ScheduleEntry, STGConfig, STGSchedule
from stg_engine.models import spec_of
from stg_engine.runtime import graphs

CONFIG = STGConfig(layers=(2,))
CASES = cases()
COPIES_LISTS = ("LTX-2", "SkyReels-V2 DF")  # without coordinates; with frame rates
FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def tapes(monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", TapeCapture)
    TapeCapture.made.clear()
    return TapeCapture.made


def counts(denoiser):
    return denoiser.graphs.captured, denoiser.graphs.replayed


def eager(transformer, inputs, config=CONFIG, **options):
    with Denoiser(transformer, config, **options) as denoiser:
        return denoiser(*inputs, guidance_scale=3.0)


def both(results):
    return results if isinstance(results, tuple) else (results,)


def config_of(case):
    skip = case.skips()[0]
    return STGConfig(layers=skip.layers, mode=skip.mode, axis=skip.axis, rescale=0.3)


def tiny(**options):
    return Denoiser(tiny_transformer(), CONFIG, graph=True, **options)


@pytest.mark.parametrize(("kernels", "videos"), [("auto", 1), ("off", 2)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_replays_of_every_family(case, kernels, videos):
    model, config = case.model(torch.float32), config_of(case)
    spec = spec_of(model)
    first = spec.latents[0]
    if spec.waits_in == "forward":
        with pytest.raises(ValueError, match=f"{spec.family}'s forward waits for the device"):
            Denoiser(model, config, kernels=kernels, graph=True)
        return
    inputs = case.inputs(videos, torch.float32)
    inputs = tuple({k: v.contiguous() if k == first else v for k, v in group.items()} for group in inputs)
    other = tuple({k: -v if k == first else v for k, v in group.items()} for group in inputs)
    with Denoiser(model, config, kernels=kernels) as denoiser:
        expected = [both(denoiser(*given, guidance_scale=3.0)) for given in (inputs, other)]
        is_fused, used = denoiser.fusion.is_everywhere, denoiser.fusion.used
    with Denoiser(model, config, kernels=kernels, graph=True) as denoiser:
        if spec.waits_in == "blocks" and not is_fused:
            with pytest.raises(RuntimeError, match=r"wait for the device where they are not fused.*graph=False"):
                denoiser(*inputs, guidance_scale=3.0)
            return
        if str(case) in COPIES_LISTS:
            with pytest.raises(RuntimeError, match=r"cannot be captured as a CUDA graph .*use graph=False"):
                denoiser(*inputs, guidance_scale=3.0)
            return
        actual = [both(denoiser(*given, guidance_scale=3.0)) for given in (inputs, other, inputs)]
        assert counts(denoiser) == (1, 2)
        assert denoiser.fusion.used == used
    for result, other_result, again in zip(*actual, strict=True):
        assert torch.equal(result, again)
        assert not torch.equal(result, other_result)
    # Timesteps of tokens go through the time embedding one by one instead of each value once.
    bound = 0.0 if inputs[0]["timestep"].ndim < 2 else FP32_RELATIVE
    for results, wanted in zip(actual, expected, strict=False):
        assert all(relative_error(a, b) <= bound for a, b in zip(results, wanted, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if spec_of(case.model(torch.float32)).waits_in], ids=str)
def test_families_that_wait_cannot_be_captured(case, monkeypatch):
    """What `waits_in` says is so."""
    model = case.model(torch.float32)
    denoiser = Denoiser(model, config_of(case), kernels="off")
    monkeypatch.setattr(graphs.Graphs, "_refuse_waiting", lambda *_: None)
    spec = replace(denoiser.spec, waits_in="")
    denoiser.graphs = graphs.Graphs(model, spec, denoiser.fusion, denoiser.memo)
    with denoiser, pytest.raises(RuntimeError, match=r"cannot be captured as a CUDA graph .*use graph=False"):
        denoiser(*case.inputs(1, torch.float32), guidance_scale=3.0)


@pytest.mark.parametrize("options", [{}, {"kernels": "off"}, {"execution": "serial"}, {"max_rows": 2}])
def test_options(options):
    inputs = tiny_inputs(1)
    expected = eager(tiny_transformer(), inputs, **options)
    with tiny(**options) as denoiser:
        for _ in range(3):
            assert torch.equal(denoiser(*inputs, guidance_scale=3.0), expected)
        assert counts(denoiser) == (1, 2)


def test_results_are_held_across_replays():
    shared, cond, uncond = tiny_inputs(1)
    with tiny() as denoiser:
        held, rows = [], []
        for i in range(4):
            given = {**shared, "hidden_states": shared["hidden_states"] * (i + 1)}
            held.append(denoiser(given, cond, uncond, guidance_scale=3.0))
            rows.append(denoiser.branches(given, cond, uncond)["cond"])
        kept = [tensor.clone() for tensor in (*held, *rows)]
        assert counts(denoiser) == (1, 7)
        denoiser({**shared, "hidden_states": shared["hidden_states"] * 9}, cond, uncond, guidance_scale=3.0)
        assert all(map(torch.equal, kept, (*held, *rows)))
        for tensor in (*held, *rows):
            tensor.fill_(torch.nan)  # nor is what the user does to them seen
        again = denoiser({**shared, "hidden_states": shared["hidden_states"] * 2}, cond, uncond, guidance_scale=3.0)
        assert torch.equal(again, kept[1])


def test_inputs_are_not_written():
    inputs = tiny_inputs(1)
    before = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items()} for group in inputs]
    with tiny() as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        other = tiny_inputs(1, seed=5)
        other[1]["encoder_attention_mask"] = inputs[1]["encoder_attention_mask"]
        other[2]["encoder_attention_mask"] = inputs[2]["encoder_attention_mask"]
        denoiser(*other, guidance_scale=3.0)
        assert counts(denoiser) == (1, 1)
    for group, copies in zip(inputs, before, strict=True):
        for name, value in group.items():
            assert torch.equal(value, copies[name]) if isinstance(value, torch.Tensor) else value == copies[name]


KINDS = {
    "videos": lambda: tiny_inputs(2),
    "tokens": lambda: tiny_inputs(1, tokens=9),
    "dtype of an input": lambda: (
        {**tiny_inputs(1)[0], "timestep": tiny_inputs(1)[0]["timestep"].double()},
        *tiny_inputs(1)[1:],
    ),
    "a scalar argument": lambda: (
        {**tiny_inputs(1)[0], "rope_interpolation_scale": (8 / 24, 32, 32)},
        *tiny_inputs(1)[1:],
    ),
    "timesteps of tokens": lambda: tiny_inputs(1, per_token=True),
    "no negative prompt": lambda: (*tiny_inputs(1)[:2], None),
    "strides": lambda: (
        {**tiny_inputs(1)[0], "hidden_states": tiny_inputs(1)[0]["hidden_states"].mT.contiguous().mT},
        *tiny_inputs(1)[1:],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_inputs_has_a_graph(kind):
    inputs, others = tiny_inputs(1), KINDS[kind]()
    with tiny(kernels="off") as denoiser, Denoiser(tiny_transformer(), CONFIG, kernels="off") as plain:
        for given in (inputs, others, inputs, others):
            scale = None if given[2] is None else 3.0
            result, expected = (engine(*given, guidance_scale=scale) for engine in (denoiser, plain))
            assert relative_error(result, expected) <= (FP32_RELATIVE if given[0]["timestep"].ndim == 2 else 0)
        assert counts(denoiser) == (2, 2)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_prompts_of_one_length_share_a_graph_and_full_ones_have_their_own(kernels):
    """Lengths are read, masks are not: but whether a prompt is padded at all decides what runs."""
    shared, *prompts = tiny_inputs(1)
    ones = torch.ones_like(prompts[0]["encoder_attention_mask"])
    with tiny(kernels=kernels) as denoiser, Denoiser(tiny_transformer(), CONFIG, kernels=kernels) as plain:
        for cond_length, uncond_length in ((3, 2), (4, 1), (6, 2), (6, 6), (3, 2), (2, 5)):
            masks = [(torch.arange(6) < length)[None] * ones for length in (cond_length, uncond_length)]
            cond, uncond = ({**p, "encoder_attention_mask": m} for p, m in zip(prompts, masks, strict=True))
            cond["encoder_hidden_states"] = cond["encoder_hidden_states"] * cond_length
            assert torch.equal(*(engine(shared, cond, uncond, guidance_scale=3.0) for engine in (denoiser, plain)))
        assert counts(denoiser) == ((3, 3) if kernels == "auto" else (1, 5))


def test_a_mask_that_is_no_padding():
    shared, *prompts = tiny_inputs(1)
    masks = [torch.tensor([[1, 0, 1, 1, 0, 1]]), torch.tensor([[0, 1, 1, 0, 0, 1]])]
    cond, uncond = ({**p, "encoder_attention_mask": m} for p, m in zip(prompts, masks, strict=True))
    expected = eager(tiny_transformer(), (shared, cond, uncond))
    with tiny() as denoiser:
        for _ in range(2):
            assert torch.equal(denoiser(shared, cond, uncond, guidance_scale=3.0), expected)
            assert "a prompt whose mask is more than padding behind it: diffusers" in denoiser.fusion.attention()
            denoiser.fusion.forget_attention()


def test_mochi_with_a_mask_that_is_no_padding_is_refused():
    case = next(case for case in CASES if case.name == "Mochi")
    shared, cond, uncond = case.inputs(1, torch.float32)
    mask = cond["encoder_attention_mask"].clone()
    mask[:, 0], mask[:, 1] = 0, 1
    with (
        Denoiser(case.model(torch.float32), config_of(case), graph=True) as denoiser,
        pytest.raises(RuntimeError, match="mask is more than padding"),
    ):
        denoiser(shared, {**cond, "encoder_attention_mask": mask}, uncond, guidance_scale=3.0)


def test_a_new_prompt_is_seen():
    shared, cond, uncond = tiny_inputs(1)
    with tiny() as denoiser:
        for seed in range(3):
            torch.manual_seed(seed)
            cond = {**cond, "encoder_hidden_states": torch.randn_like(cond["encoder_hidden_states"])}
            expected = eager(tiny_transformer(), (shared, cond, uncond))
            assert torch.equal(denoiser(shared, cond, uncond, guidance_scale=3.0), expected)
        cond["encoder_hidden_states"].data.mul_(2)  # in a way that PyTorch does not count
        expected = eager(tiny_transformer(), (shared, cond, uncond))
        assert torch.equal(denoiser(shared, cond, uncond, guidance_scale=3.0), expected)
        assert counts(denoiser) == (1, 3)


def test_on_and_off_inside_a_run():
    """A window and scales: one graph with the skips, one without, whatever they are scaled by."""
    entries = (
        ScheduleEntry(0.9, (2,), 1.0, 0.0, 4.0),
        ScheduleEntry(0.6, (2,), 0.5, 0.7, 2.0),
        ScheduleEntry(0.3, (1,), 0.5),
        ScheduleEntry(0.1, guidance_scale=2.0),
    )
    inputs = tiny_inputs(1)
    config = STGConfig(layers=(2,), start=0.2, stop=0.6)
    with Denoiser(tiny_transformer(), config, graph=True) as denoiser:
        for _ in range(2):
            for step in range(10):
                result = denoiser(*inputs, guidance_scale=3.0, progress=step / 10)
                assert torch.equal(result, eager_step(config, inputs, progress=step / 10))
        assert counts(denoiser) == (2, 18)
    config = STGConfig(schedule=STGSchedule(entries, "at_or_below"))
    with Denoiser(tiny_transformer(), config, graph=True) as denoiser:
        for sigma in (1.0, 0.9, 0.6, 0.5, 0.3, 0.1, 1.0, 0.05):
            result = denoiser(*inputs, guidance_scale=3.0, sigma=sigma)
            assert torch.equal(result, eager_step(config, inputs, sigma=sigma))
        assert counts(denoiser) == (3, 5)


def eager_step(config, inputs, **at):
    with Denoiser(tiny_transformer(), config) as denoiser:
        return denoiser(*inputs, guidance_scale=3.0, **at)


def replace_weight(model):
    model.transformer_blocks[1].attn1.to_q.weight = torch.nn.Parameter(-model.transformer_blocks[1].attn1.to_q.weight)


def move_weight(model):
    weight = model.transformer_blocks[1].attn1.to_q.weight
    weight.data = -weight.data.clone()


def transpose_weight(model):
    weight = model.transformer_blocks[1].attn1.to_q.weight
    weight.data = weight.data.t()  # where it was


def add_adapter(model):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))


def add_hook(model):
    model.transformer_blocks[1].ff.register_forward_hook(lambda module, args, output: output * 2)


def change_processor(model):
    class Doubled(LTXVideoAttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    model.transformer_blocks[1].attn1.set_processor(Doubled())


def change_attribute(model):
    model.transformer_blocks[1].norm1.eps = 0.5
    model.transformer_blocks[3].norm1.eps = 0.5


def replace_module(model):
    model.transformer_blocks[1].ff = tiny_transformer(seed=3).transformer_blocks[1].ff


CHANGES = (
    *(replace_weight, move_weight, transpose_weight),
    *(add_adapter, add_hook, change_processor, change_attribute, replace_module),
)


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_captured_anew(change, kernels):
    model, inputs = tiny_transformer(), tiny_inputs(1)
    changed = tiny_transformer()
    change(changed)
    with Denoiser(model, CONFIG, kernels=kernels, graph=True) as denoiser:
        before = [denoiser(*inputs, guidance_scale=3.0) for _ in range(2)][1]
        change(model)
        expected = eager(changed, inputs, kernels=kernels)
        after = [denoiser(*inputs, guidance_scale=3.0) for _ in range(2)]
        assert counts(denoiser) == (2, 2)
        assert len(denoiser.graphs) == 1
    assert not torch.equal(before, expected)
    assert all(torch.equal(result, expected) for result in after)


def test_adapters_are_scaled_switched_and_merged():
    inputs = tiny_inputs(1)
    models = [tiny_transformer() for _ in range(2)]
    for model in models:
        add_adapter(model)
    changes = (
        lambda model: model.set_adapters(["default"], [0.3]),
        lambda model: model.disable_adapters(),
        lambda model: model.enable_adapters(),
        lambda model: model.fuse_lora(),
    )
    with Denoiser(models[0], CONFIG, graph=True) as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        seen = []
        for change in changes:
            for model in models:
                change(model)
            seen.append(eager(models[1], inputs))
            assert torch.equal(denoiser(*inputs, guidance_scale=3.0), seen[-1])
        assert denoiser.graphs.captured >= 4
    assert not torch.equal(seen[0], seen[1])


def test_weights_written_in_place_are_seen_without_a_capture():
    model, inputs, changed = tiny_transformer(), tiny_inputs(1), tiny_transformer()
    with Denoiser(model, CONFIG, graph=True) as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        for each in (model, changed):
            each.transformer_blocks[1].attn2.to_k.weight.mul_(2)
            each.proj_out.weight.data.mul_(3)
        assert torch.equal(denoiser(*inputs, guidance_scale=3.0), eager(changed, inputs))
        assert counts(denoiser) == (1, 1)


def test_a_parameter_of_one_element_is_compared_by_identity():
    model, inputs = tiny_transformer(), tiny_inputs(1)
    model.register_parameter("one", torch.nn.Parameter(torch.ones(1)))
    with Denoiser(model, CONFIG, graph=True) as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        model.one = torch.nn.Parameter(torch.ones(1))
        denoiser(*inputs, guidance_scale=3.0)
        assert counts(denoiser) == (2, 0)


def test_what_ran_is_said_of_replays():
    inputs = tiny_inputs(1)
    with tiny() as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        used, attention = denoiser.fusion.used, denoiser.fusion.attention()
        assert attention
        denoiser.fusion.forget_attention()
        assert denoiser.fusion.attention() == ()
        denoiser(*inputs, guidance_scale=3.0)
        assert (denoiser.fusion.used, denoiser.fusion.attention()) == (used, attention)


def test_release_and_detach_drop_everything(tapes):
    denoiser, inputs = tiny(), tiny_inputs(1)
    denoiser(*inputs, guidance_scale=3.0)
    gone = weakref.ref(tapes.pop())
    denoiser.release()
    gc.collect()
    assert gone() is None
    assert len(denoiser.graphs) == len(denoiser.memo) == 0
    denoiser(*inputs, guidance_scale=3.0)
    assert counts(denoiser) == (2, 0)
    gone = weakref.ref(tapes.pop())
    denoiser.detach()
    gc.collect()
    assert gone() is None


def test_a_graph_that_is_no_longer_valid_is_dropped_before_the_next_is_captured(monkeypatch):
    model, inputs = tiny_transformer(), tiny_inputs(1)
    with Denoiser(model, CONFIG, graph=True) as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        graph = weakref.ref(next(iter(denoiser.graphs._graphs.values())))
        replace_weight(model)
        monkeypatch.setattr(TapeCapture, "capture", lambda *_: pytest.fail("held") if graph() else lambda: None)
        denoiser(*inputs, guidance_scale=3.0)


def test_a_failed_capture_leaves_the_denoiser_as_it_was(monkeypatch):
    inputs = tiny_inputs(1)
    expected = eager(tiny_transformer(), inputs)

    def fail(self, function):
        function()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    with tiny() as denoiser:
        with monkeypatch.context() as patch:
            patch.setattr(TapeCapture, "capture", fail)
            with pytest.raises(RuntimeError, match=r"LTX-Video cannot be .* capturing\); use graph=False$"):
                denoiser(*inputs, guidance_scale=3.0)
        assert len(denoiser.graphs) == len(denoiser.memo) == 0
        assert denoiser._slot.run is None
        assert not denoiser.memo.is_paused
        for _ in range(2):
            assert torch.equal(denoiser(*inputs, guidance_scale=3.0), expected)
        assert counts(denoiser) == (1, 1)


def test_the_number_of_graphs_is_bounded(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    shared, cond, uncond = tiny_inputs(1)
    with tiny() as denoiser:
        kinds = [{**shared, "rope_interpolation_scale": (1 / (i + 3), 32, 32)} for i in range(3)]
        for kind in (kinds[0], kinds[1], kinds[0]):
            denoiser(kind, cond, uncond, guidance_scale=3.0)
        with pytest.warns(UserWarning, match="more than 2 CUDA graphs"):
            denoiser(kinds[2], cond, uncond, guidance_scale=3.0)
        assert counts(denoiser) == (3, 1)
        denoiser(kinds[0], cond, uncond, guidance_scale=3.0)  # the one replayed last was kept
        assert counts(denoiser) == (3, 2)
        assert len(denoiser.graphs) == 2


def test_graphs_of_one_denoiser_share_a_pool(tapes):
    with tiny(kernels="off") as denoiser:
        for videos in (1, 2):
            denoiser(*tiny_inputs(videos), guidance_scale=3.0)
        assert len(tapes) == 1
        assert len(tapes[0].tapes) == tapes[0].warm_ups == 2


def test_gradients_are_refused():
    with tiny() as denoiser, torch.enable_grad(), pytest.raises(RuntimeError, match=r"no gradients.*graph=False"):
        denoiser(*tiny_inputs(1), guidance_scale=3.0)


def test_inference_mode_on_and_off():
    shared, cond, uncond = tiny_inputs(1)
    expected = eager(tiny_transformer(), (shared, cond, uncond))
    with tiny() as denoiser:
        with torch.inference_mode():
            first = denoiser(shared, cond, uncond, guidance_scale=3.0)
        second = denoiser(shared, cond, uncond, guidance_scale=3.0)
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)


def test_an_argument_that_may_change_unseen_is_refused():
    shared, cond, uncond = tiny_inputs(1)
    shared["attention_kwargs"] = {"what": object()}
    with (
        tiny() as denoiser,
        pytest.raises(ValueError, match=r"inputs\[0\]\['attention_kwargs'\]\['what'\] is a object"),
    ):
        denoiser(shared, cond, uncond, guidance_scale=3.0)


def test_named_tuples():
    shared, cond, uncond = tiny_inputs(1)
    scale = namedtuple("Scale", ("frames", "height", "width"))(8 / 25, 32, 32)
    inputs = {**shared, "rope_interpolation_scale": scale}, cond, uncond
    with tiny() as denoiser:
        assert torch.equal(denoiser(*inputs, guidance_scale=3.0), eager(tiny_transformer(), inputs))


def test_tensors_elsewhere_are_constants():
    """A tensor that is not on the model's device is part of the kind, by its values."""
    device = torch.device("cuda")
    tensors = []
    keys = [graphs._key(torch.tensor(value), device, tensors, "timestep") for value in (1.0, 2.0, 1.0)]
    assert keys[0] == keys[2] != keys[1]
    assert not tensors
    with pytest.raises(ValueError, match=r"timestep has 5000 values on cpu; move it to cuda"):
        graphs._key(torch.zeros(5000), device, tensors, "timestep")


@pytest.mark.parametrize("name", ["offload", "casting"])
def test_hooks_that_move_weights_are_refused(name):
    class Casting(ModelHook):
        pass

    model = tiny_transformer()
    if name == "offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1].ff).register_hook(Casting(), "casting")
    with (
        Denoiser(model, CONFIG, graph=True) as denoiser,
        pytest.raises(RuntimeError, match=r"(SequentialHook|Casting) is on the transformer.*graph=False"),
    ):
        denoiser(*tiny_inputs(1), guidance_scale=3.0)


def test_devices_without_graphs(monkeypatch):
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="graph=True is not allowed on cpu: there is no CUDA device here"):
            Denoiser(tiny_transformer(), CONFIG, graph=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with (
        Denoiser(tiny_transformer(), CONFIG, graph=True) as denoiser,
        pytest.raises(ValueError, match="graph=True is not allowed on cpu; move the model to a CUDA device"),
    ):
        denoiser(*tiny_inputs(1), guidance_scale=3.0)


@pytest.mark.parametrize("case", pipeline_cases(), ids=str)
def test_pipelines(case):
    """Steps before the window are plain; graphs are gone behind the call."""
    pipe, config = case.build(), replace(config_of(case.case), rescale=0.0, start=0.4)
    with stg_engine.attach(pipe, config) as engine:
        expected, report = case.latents(pipe), engine.report()
    if engine.denoiser.spec.waits_in == "forward":
        with pytest.raises(ValueError, match="waits for the device"):
            stg_engine.attach(pipe, config, graph=True)
        return
    with stg_engine.attach(pipe, config, graph=True) as engine:
        for _ in range(2):
            assert torch.equal(case.latents(pipe), expected)
            counted = [(d.graphs.captured, d.graphs.replayed, d.graphs.uncaptured) for d in engine.denoisers]
            assert engine.report().graphs.startswith(str(engine.denoisers[0].graphs).split(" ")[0])
            assert not any(len(denoiser.graphs) for denoiser in engine.denoisers)
        assert (engine.report().kernels, engine.report().attention) == (report.kernels, report.attention)
    assert sum(map(sum, counted)) >= report.steps
    if engine.denoiser.spec.waits_in:
        assert counted[0][2] > 0
        assert "plain calls without: blocks of Mochi wait for the device" in str(engine.report())


@pytest.mark.parametrize(("variant", "captured"), [("LTX-2", 1), ("LTX-2.3", 2)])  # the former ignores its blocks
def test_pipelines_with_passes_of_their_own(variant, captured):
    """The first STG pass runs as it is, without a graph: it shows the layers."""
    pipe = ltx2_pipes.build("text", variant)
    with stg_engine.attach(pipe):
        expected = ltx2_pipes.latents(pipe)
    with stg_engine.attach(pipe, graph=True) as engine:
        assert all(map(torch.equal, ltx2_pipes.latents(pipe), expected))
        assert engine.report().graphs.startswith(f"{captured} captured, ")
        assert engine.denoiser.graphs.replayed > 0


def test_a_first_call_in_a_process_captures_once():
    """Modules that are imported when blocks are first fused are no reason to capture again."""
    code = """
import torch
from engine.tape import TapeCapture
from engine.tiny import tiny_inputs, tiny_transformer
from stg_engine import Denoiser, STGConfig
from stg_engine.runtime import graphs
graphs.CudaCapture = TapeCapture
with torch.no_grad(), Denoiser(tiny_transformer(), STGConfig(layers=(2,)), graph=True) as denoiser:
    for _ in range(3):
        denoiser(*tiny_inputs(1), guidance_scale=3.0)
    print(denoiser.graphs)
"""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / name) for name in (".", "kernels", "tests"))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "1 captured, 2 replays\n", done.stderr
