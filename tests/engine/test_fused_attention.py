"""Attention of fused blocks: prompt padding as lengths, the backend that runs, what the report says of it."""

import json

import pytest
import stg_kernels
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from engine.tiny import CALL, latents_of, tiny_inputs, tiny_pipeline, tiny_transformer
from stg_kernels.attention import backends, choices, dispatch

import stg_engine
from stg_engine import Denoiser, STGConfig
from stg_engine import inputs as engine_inputs
from stg_engine.fused import parts
from stg_engine.inputs import key_lengths
from stg_engine.plan import Plan
from stg_engine.rows import Run

FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
CONFIG = STGConfig(layers=(2,))


@pytest.fixture(autouse=True)
def fused(monkeypatch, tmp_path):
    """Fused blocks whether or not the compiled library is there, and choices of this test alone."""
    monkeypatch.setattr(stg_kernels, "accelerates", lambda device: True)
    monkeypatch.setenv("STG_ATTENTION_CACHE", str(tmp_path / "attention.json"))
    monkeypatch.delenv("STG_ATTENTION", raising=False)
    monkeypatch.setattr(dispatch, "choices", choices.Choices())
    monkeypatch.setattr(dispatch, "_ran", {})
    with torch.no_grad():
        yield


@pytest.fixture
def attention_calls(monkeypatch):
    """The keyword arguments of every call of the op."""
    calls = []

    def record(*args, **kwargs):
        calls.append(kwargs)
        return stg_kernels.branch_attention(*args, **kwargs)

    monkeypatch.setattr(parts, "branch_attention", record)
    return calls


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[1, 1, 0], [1, 0, 0]], [2, 1]),
        ([[True, True, True]], [3]),
        ([[1.0, 0.0]], [1]),
        ([[0, 1, 1]], []),
        ([[1, 0, 1]], []),
        ([[1, 1], [0, 0]], []),
        ([[1.0, 0.5]], []),
        ([[[0.0, -10000.0]]], []),
        ([[2, 0]], []),
    ],
)
def test_key_lengths(mask, expected):
    assert key_lengths(torch.tensor(mask)).tolist() == expected


def test_a_prompt_without_tokens_has_a_length_where_others_keys_stand_beside_it():
    assert key_lengths(torch.tensor([[1, 1], [0, 0]]), at_least=0).tolist() == [2, 0]


def test_lengths_are_exact_beyond_the_dtypes_integers():
    mask = torch.zeros(1, 1024, dtype=torch.bfloat16)
    mask[:, :513] = 1
    assert key_lengths(mask).tolist() == [513]


def guided(transformer, inputs, **options):
    with Denoiser(transformer, CONFIG, **options) as denoiser:
        return denoiser(*inputs, guidance_scale=3.0)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


MASKS = {
    "padded": torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]),
    "full": torch.ones(2, 6),
    "holes": torch.tensor([[1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0]]),
    "left": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
    "none": None,
}


@pytest.mark.parametrize("max_rows", [None, 1])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_gives_what_the_modules_give(name, max_rows, attention_calls):
    shared, cond, uncond = tiny_inputs(2)
    for prompt, mask in ((cond, MASKS[name]), (uncond, MASKS["full"] if name == "padded" else MASKS[name])):
        prompt["encoder_attention_mask"] = mask
    inputs, transformer = (shared, cond, uncond), tiny_transformer()
    expected = guided(transformer, inputs, kernels="off", max_rows=max_rows)
    assert relative_error(guided(transformer, inputs, max_rows=max_rows), expected) <= FP32_RELATIVE
    lengths = [call["key_lengths"] for call in attention_calls if call["key_lengths"] is not None]
    assert bool(lengths) == (name == "padded")
    if max_rows is None:  # self- and cross-attention of four blocks, but for masks that lengths cannot say
        assert len(attention_calls) == (4 if name in ("holes", "left") else 8)


def test_a_full_prompt_beside_a_padded_one_has_the_bits_of_its_pass_run_alone(attention_calls):
    shared, cond, uncond = tiny_inputs(1)
    cond["encoder_attention_mask"] = MASKS["full"][:1]
    uncond["encoder_attention_mask"] = MASKS["padded"][:1]
    transformer = tiny_transformer()
    with Denoiser(transformer, CONFIG, execution="serial") as engine:
        beside = engine.branches(shared, cond, uncond)["cond"]
        lengths = [call["key_lengths"] for call in attention_calls]
        assert len([x for x in lengths if x is not None]) == 4  # uncond's alone
        assert torch.equal(engine.branches(shared, cond)["cond"], beside)


def test_lengths_follow_the_rows_to_their_device():
    run = Run(Plan.build(CONFIG, 4, uncond=False), None, 1, None, None, (), (), torch.tensor([3]), (False,))
    assert run._lengths(torch.device("meta")).device.type == "meta"
    assert run._lengths(torch.device("cpu")) is run.lengths


def test_padding_is_not_read():
    shared, cond, uncond = tiny_inputs(1)
    cond["encoder_attention_mask"] = torch.tensor([[1, 1, 0, 0, 0, 0]])
    transformer = tiny_transformer()
    expected = guided(transformer, (shared, cond, uncond))
    cond["encoder_hidden_states"] = cond["encoder_hidden_states"].clone()
    cond["encoder_hidden_states"][:, 2:] = torch.nan
    assert torch.equal(guided(transformer, (shared, cond, uncond)), expected)


def test_lengths_are_read_once_per_prompt(monkeypatch):
    count = []
    monkeypatch.setattr(engine_inputs, "key_lengths", lambda *mask: count.append(1) or key_lengths(*mask))
    inputs = tiny_inputs(1)
    with Denoiser(tiny_transformer(), CONFIG) as engine:
        for _ in range(3):
            engine(*inputs, guidance_scale=3.0)
        assert len(count) == 1
        inputs[1]["encoder_attention_mask"] = inputs[1]["encoder_attention_mask"].clone()
        engine(*inputs, guidance_scale=3.0)
    assert len(count) == 2


@pytest.mark.parametrize("where", ["module", "context"])
def test_a_backend_chosen_in_diffusers_is_kept(where, attention_calls):
    transformer, inputs = tiny_transformer(), tiny_inputs(2)
    expected = guided(transformer, inputs, kernels="off")
    if where == "module":
        for block in transformer.transformer_blocks:  # set_attention_backend also changes every other model's
            block.attn1.processor._attention_backend = AttentionBackendName._NATIVE_MATH
            block.attn2.processor._attention_backend = AttentionBackendName._NATIVE_MATH
        actual = guided(transformer, inputs)
    else:
        with attention_backend("_native_math"):
            actual = guided(transformer, inputs)
    assert attention_calls == []
    assert relative_error(actual, expected) <= FP32_RELATIVE


def test_a_pinned_backend_runs_and_is_reported(monkeypatch):
    monkeypatch.setenv("STG_ATTENTION", "torch")
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG) as engine:
        latents_of(pipe)
    assert {line.split(": ")[1] for line in engine.report().attention} == {"torch, pinned"}
    assert "attention  up to" in str(engine.report())
    monkeypatch.setenv("STG_ATTENTION", "sdpa/flash")
    with stg_engine.attach(pipe, CONFIG), pytest.raises(RuntimeError, match=r"'sdpa/flash' cannot run .* CUDA tensors"):
        latents_of(pipe)


def test_the_report_is_of_the_last_call():
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG) as engine:
        latents_of(pipe)
        kinds = engine.report().attention
        latents_of(pipe, height=64, width=64)
    assert kinds
    assert not set(kinds) & {line for line in engine.report().attention if "dense" in line}


def test_tuning_measures_in_a_pipeline_and_keeps_the_choice(monkeypatch, tmp_path):
    fast = backends.Backend("fast", lambda part: "", dispatch.reference.attention)
    monkeypatch.setattr(dispatch, "backends", lambda: (*backends.LIBRARIES[:1], fast, backends.TORCH))
    monkeypatch.setattr(dispatch, "measure", lambda call, device: 1.0 if call.func is fast.run else 2.0)
    pipe = tiny_pipeline()
    with stg_engine.attach(pipe, CONFIG) as engine:
        with stg_engine.tuning():
            latents_of(pipe, num_inference_steps=2)
        latents_of(pipe)
    assert CALL["num_inference_steps"] == engine.report().steps
    assert all(line.endswith("fast, measured") for line in engine.report().attention)
    stored = json.loads((tmp_path / "attention.json").read_text())
    assert {entry["backend"] for entry in stored} == {"fast"}


def test_an_unknown_backend_is_refused_on_attach(monkeypatch):
    monkeypatch.setenv("STG_ATTENTION", "torch,foo")
    with pytest.raises(ValueError, match="attention backend 'foo' is not allowed; choose from sdpa"):
        stg_engine.attach(tiny_pipeline(), CONFIG)


def test_the_report_says_that_diffusers_has_the_masks():
    shared, cond, uncond = tiny_inputs(2)
    cond["encoder_attention_mask"] = uncond["encoder_attention_mask"] = MASKS["left"]
    with Denoiser(tiny_transformer(), CONFIG) as engine:
        engine(shared, cond, uncond, guidance_scale=3.0)
        assert engine.fusion.attention()[-1].endswith("more than padding behind it: diffusers")


@pytest.mark.parametrize("why", ["kernels", "pinned", "no_guided_step"])
def test_tuning_that_measures_nothing_warns(monkeypatch, why):
    if why == "pinned":
        monkeypatch.setenv("STG_ATTENTION", "sdpa")
    config = STGConfig(layers=(2,), start=0.9) if why == "no_guided_step" else CONFIG
    pipe = tiny_pipeline()
    with (
        stg_engine.attach(pipe, config, kernels="off" if why == "kernels" else "auto"),
        pytest.warns(UserWarning, match="nothing to measure"),
        stg_engine.tuning(),
    ):
        latents_of(pipe, num_inference_steps=2)
