"""Presets and conventions: what they compute against the published formulas, what they cost, what they refuse."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import stg_kernels
import torch
from engine.tiny import tiny_inputs, tiny_transformer
from models.families import mochi

from stg_engine import Denoiser, Plan, STGConfig
from stg_engine.calls.base import Calls
from stg_engine.combine import Combiner
from stg_engine.comfyui import read_preset, read_presets
from stg_engine.config import AudioGuidance, Skip
from stg_engine.conventions import CONVENTIONS
from stg_engine.fused import Fusion
from stg_engine.models import supported
from stg_engine.plan import build_plans
from stg_engine.presets import PRESETS
from stg_engine.reference import passes_one_by_one, three_passes

G, S, R, SIGMA = 4.0, 1.5, 0.7, 0.7
FP32_RELATIVE = 2e-6


def f_of(c, out, r, batch):
    """`r std(c) / std(out) + 1 - r`, N - 1."""
    if batch:
        return r * c.std() / out.std() + (1 - r)
    return torch.stack([r * a.std() / b.std() + (1 - r) for a, b in zip(c, out, strict=True)])[:, None, None]


def stg(c, u, p, x, sigma):
    out = u + G * (c - u) + S * (c - p)
    return out * f_of(c, out, R, batch=True)


def ltx_video(c, u, p, x, sigma):
    u = torch.stack([(a * b).sum() / ((b * b).sum() + 1e-8) * b for a, b in zip(c, u, strict=True)])
    out = u + G * (c - u) + S * (c - p)
    return out * f_of(c, out, R, batch=False)


def in_x0(c, u, p, x, sigma, batch, star=False):
    c, u, p = (x - sigma * v for v in (c, u, p))
    if star:
        u = torch.stack([(a * b).sum() / ((b * b).sum() + 1e-8) * b for a, b in zip(c, u, strict=True)])
    out = c + (G - 1) * (c - u) + S * (c - p)
    out = out * f_of(c, out, R, batch)
    return torch.where(sigma > 0, (x - out) / sigma, 0.0)


def wan_official(c, u, p, x, sigma):
    q = u + G * (c - u)
    return q + S * (q - p)


FORMULAS = {
    "stg": stg,
    "ltx-video": ltx_video,
    "ltx-2": lambda *a: in_x0(*a, batch=True),
    "ltx-2-diffusers": lambda *a: in_x0(*a, batch=False),
    "wan-official": wan_official,
    "wan": lambda c, u, p, x, sigma: u + G * (c - u) + S * (c - p),
    "slg-uncond": lambda c, u, p, x, sigma: p + G * (c - p),
    "comfyui": lambda *a: in_x0(*a, batch=True, star=True),
}
WITHOUT_RESCALE = ("wan-official", "wan", "slg-uncond")


def setting(name, **changes):
    """The convention with layer 1, and the scales of the formulas."""
    fields = {"layers": (1,), "scale": 1.0 if name == "slg-uncond" else S}
    return STGConfig.preset(name, **{**fields, "rescale": 0.0 if name in WITHOUT_RESCALE else R, **changes})


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def combined(config, branches, *, step=None, g=G, **options):
    """What the engine makes of predictions by name."""
    combiner = Combiner(config, Fusion(None, "off"))
    return combiner(step or config.at(), tuple(branches), torch.cat(list(branches.values())), g, **options)


@pytest.fixture
def predictions():
    """u, c, p, x of two videos."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, 6, 8, generator=generator, dtype=torch.float64).unbind()


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def branches_of(config, u, c, p):
    return {"uncond": p, "cond": c} if config.weak_pass == "uncond" else {"uncond": u, "cond": c, "skip": p}


def test_every_convention_has_a_formula():
    assert set(FORMULAS) == set(CONVENTIONS)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("token_sigmas", [False, True], ids=["sigma", "sigma_per_token"])
def test_formula(predictions, name, token_sigmas):
    u, c, p, x = predictions
    config = setting(name)
    sigma = torch.full((2, 6), SIGMA, dtype=torch.float64)
    if token_sigmas:
        sigma[:, :2] = 0.0
        sigma[1, 2] = 0.3
    expected = FORMULAS[name](c, u, p, x, sigma[..., None])
    actual = combined(config, branches_of(config, u, c, p), latents=x, sigma=sigma if token_sigmas else SIGMA)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    others = {
        other
        for other, formula in FORMULAS.items()
        if relative_error(formula(c, u, p, x, sigma[..., None]), actual) < 1e-6
    }
    assert others == {name}  # the formulas differ, so that a mixed-up convention is seen


@pytest.mark.parametrize("name", FORMULAS)
def test_equal_predictions_give_cfg(predictions, name):
    """The weights sum to one: p = c (p = q on the negative prompt, p = u in uncond) adds nothing."""
    u, c, _, x = predictions
    config = setting(name, rescale=0.0, cfg_star=False)
    q = u + G * (c - u)
    p = {"prompt": c, "negative_prompt": q, "uncond": u}[config.weak_pass]
    actual = combined(config, branches_of(config, u, c, p), latents=x, sigma=SIGMA)
    torch.testing.assert_close(actual, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernels", ["off", "auto"])
@pytest.mark.parametrize("execution", ["batched", "serial"])
@pytest.mark.parametrize("mode", ["residual", "attention"])
@pytest.mark.parametrize("layers", [(0,), (1,), (1, 3)], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_end_to_end(transformer, name, layers, mode, execution, kernels):
    """A Denoiser against the formula on passes run alone, and against `three_passes`."""
    shared, cond, uncond = tiny_inputs(2, per_token=True)
    config = setting(name, layers=layers, mode=mode)
    sigmas = (shared["timestep"] / 1000).float()
    alone = passes_one_by_one(transformer, config.skips, shared, cond, uncond, config.weak_pass)
    weak = alone["uncond" if config.weak_pass == "uncond" else "skip"]
    expected = FORMULAS[name](alone["cond"], alone["uncond"], weak, shared["hidden_states"], sigmas[..., None])
    arguments = {"sigma": SIGMA, "token_sigmas": sigmas}
    with Denoiser(transformer, config, execution=execution, kernels=kernels) as denoiser:
        actual = denoiser(shared, cond, uncond, guidance_scale=G, **arguments)
    # The weights multiply the branches' error; sigma divides that of x0.
    assert relative_error(actual, expected) <= (1 + S) * G / SIGMA * FP32_RELATIVE
    if config.space == "model":
        assert relative_error(actual, alone["cond"]) > 0.01
    reference = three_passes(transformer, config, shared, cond, uncond, G, **arguments)
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weak_pass", ["negative_prompt", "uncond"])
@pytest.mark.parametrize("mode", ["residual", "attention"])
def test_serial_is_bitwise(transformer, weak_pass, mode):
    shared, cond, uncond = tiny_inputs(1)
    config = STGConfig(layers=(1, 2), mode=mode, weak_pass=weak_pass)
    expected = passes_one_by_one(transformer, config.skips, shared, cond, uncond, weak_pass)
    with Denoiser(transformer, config, execution="serial", kernels="off") as denoiser:
        actual = denoiser.branches(shared, cond, uncond)
    assert set(actual) == set(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_weak_passes_compute_only_the_planned_rows(transformer):
    """uncond skipped: no rows for it in the block; the negative prompt: uncond's rows up to the skip."""
    shared, cond, uncond = tiny_inputs(1)
    for weak_pass, rows in (("uncond", [2, 2, 1, 2]), ("negative_prompt", [2, 2, 2, 3])):
        seen = []
        spies = [
            block.ff.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
            for block in transformer.transformer_blocks
        ]
        with Denoiser(transformer, STGConfig(layers=(2,), weak_pass=weak_pass), kernels="off") as denoiser:
            denoiser(shared, cond, uncond, guidance_scale=G)
            assert [len(names) for names in denoiser.plans().rows] == seen == rows
        for spy in spies:
            spy.remove()


def test_several_skips_on_the_negative_prompt(transformer):
    shared, cond, uncond = tiny_inputs(2)
    config = STGConfig(layers=(1,), weak_pass="negative_prompt", extra_skips=(Skip((2,), 0.5, "attention"),))
    alone = passes_one_by_one(transformer, config.skips, shared, cond, uncond, config.weak_pass)
    q = alone["uncond"] + G * (alone["cond"] - alone["uncond"])
    expected = q + (q - alone["skip"]) + 0.5 * (q - alone["skip2"])
    for kernels in ("off", "auto"):
        with Denoiser(transformer, config, kernels=kernels) as denoiser:
            actual = denoiser(shared, cond, uncond, guidance_scale=G)
            assert set(denoiser.differences) == {"skip", "skip2"}
        assert relative_error(actual, expected) <= 20 * FP32_RELATIVE


@pytest.mark.parametrize("weak_pass", ["negative_prompt", "uncond"])
def test_no_uncond_to_act_on(transformer, weak_pass):
    shared, cond, _ = tiny_inputs(1)
    with Denoiser(transformer, STGConfig(layers=(1,), weak_pass=weak_pass)) as denoiser:
        message = f"weak_pass='{weak_pass}' acts through CFG, which is off: pass a guidance scale above 1"
        with pytest.raises(ValueError, match=message):
            denoiser(shared, cond)
        with pytest.raises(ValueError, match=message):
            denoiser.plans(guidance_scale=1.0)
    config = STGConfig(layers=(1,), weak_pass=weak_pass, start=0.5)
    with Denoiser(transformer, config) as denoiser:  # outside the window there is nothing that needs it
        assert torch.equal(denoiser(shared, cond, progress=0.0), transformer(**shared, **cond, return_dict=False)[0])
    with Denoiser(transformer, STGConfig(layers=(1,), weak_pass=weak_pass, scale=0.0)) as denoiser:
        assert torch.equal(denoiser(shared, cond), transformer(**shared, **cond, return_dict=False)[0])
    with pytest.raises(ValueError, match="needs uncond"):
        passes_one_by_one(transformer, (Skip((1,)),), shared, cond, None, weak_pass)


@pytest.mark.parametrize("name", ["stg", "ltx-2", "ltx-video"])
def test_rescale_in_steps_of_cfg_alone(transformer, name):
    shared, cond, uncond = tiny_inputs(2)
    config = setting(name, start=0.5, cfg_star=False, arithmetic="float32")
    arguments = {"progress": 0.0, "sigma": SIGMA}
    c, u = (transformer(**shared, **prompt, return_dict=False)[0] for prompt in (cond, uncond))
    expected = out = u + G * (c - u)
    if name == "stg":
        expected = out * f_of(c, out, R, batch=True)
    if name == "ltx-2":
        x = shared["hidden_states"]
        clean = x - SIGMA * out
        expected = (x - clean * f_of(x - SIGMA * c, clean, R, batch=True)) / SIGMA
    with Denoiser(transformer, config) as denoiser:
        actual = denoiser(shared, cond, uncond, guidance_scale=G, **arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        three_passes(transformer, config, shared, cond, uncond, G, **arguments), expected, rtol=1e-5, atol=1e-5
    )
    assert config.at(0.0).is_plain == (name == "ltx-video")


def test_zero_init(transformer):
    """Above the threshold no pass runs and the step leads to x0 = 0: x + (0 - sigma) v = 0."""
    shared, cond, uncond = tiny_inputs(1)
    config = STGConfig(layers=(1,), zero_init=0.9)
    calls = []
    spy = transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with Denoiser(transformer, config) as denoiser:
        v = denoiser(shared, cond, uncond, guidance_scale=G, sigma=0.95)
        assert not calls
        denoiser(shared, cond, uncond, guidance_scale=G, sigma=0.9)
        assert calls
        with pytest.raises(ValueError, match=r"sigma=None is not allowed: this setting has zero_init=0.9"):
            denoiser(shared, cond, uncond, guidance_scale=G)
        with pytest.raises(ValueError, match=r"zero_init=0.9 leaves nothing to predict"):
            denoiser.branches(shared, cond, uncond, sigma=0.95)
    spy.remove()
    torch.testing.assert_close(shared["hidden_states"] - 0.95 * v, torch.zeros_like(v), atol=1e-6, rtol=0)
    assert torch.equal(v, three_passes(transformer, config, shared, cond, uncond, G, sigma=0.95))


def test_x0_needs_latents_and_sigma(transformer):
    shared, cond, uncond = tiny_inputs(1)
    with Denoiser(transformer, setting("ltx-2")) as denoiser:
        assert denoiser.config.needs_sigma
        with pytest.raises(ValueError, match="sigma=None is not allowed: space='x0'"):
            denoiser(shared, cond, uncond, guidance_scale=G)
        with pytest.raises(ValueError, match="token_sigmas holds 2 tensors; it must hold one for each of 1 outputs"):
            denoiser(shared, cond, uncond, guidance_scale=G, sigma=0.5, token_sigmas=[torch.ones(1, 24)] * 2)
        with pytest.raises(ValueError, match=r"sigma has shape \(1, 7\)"):
            denoiser(shared, cond, uncond, guidance_scale=G, sigma=0.5, token_sigmas=torch.ones(1, 7))
    with Denoiser(transformer, setting("ltx-2", rescale=0.0)) as denoiser:  # linear: space makes no difference
        assert not denoiser.config.needs_sigma
        denoiser(shared, cond, uncond, guidance_scale=G)


def test_what_a_family_cannot_do(transformer):
    other = mochi.model(torch.float32)
    for field, config in (
        ("space='x0'", setting("ltx-2")),
        ("zero_init=0.9", STGConfig(layers=(1,), zero_init=0.9)),
    ):
        with pytest.raises(ValueError, match=f"{field} is not allowed: Mochi does not predict the velocity"):
            Denoiser(other, config)
    with pytest.raises(ValueError, match=r"audio=AudioGuidance\(.*LTX-Video predicts no audio"):
        Denoiser(transformer, STGConfig(layers=(1,), audio=AudioGuidance(scale=2.0)))


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_guidance_scale_per_token(transformer, kernels):
    shared, cond, uncond = tiny_inputs(2)
    g = torch.linspace(1, 3, 2).repeat_interleave(12)[None, :, None]  # per frame
    config = STGConfig(layers=(1,), scale=S)
    alone = passes_one_by_one(transformer, config.skips, shared, cond, uncond)
    c, u, p = alone["cond"], alone["uncond"], alone["skip"]
    with Denoiser(transformer, config, kernels=kernels) as denoiser:
        actual = denoiser(shared, cond, uncond, guidance_scale=g)
        assert relative_error(actual, u + g * (c - u) + S * (c - p)) <= 10 * FP32_RELATIVE
        with pytest.raises(ValueError, match=r"guidance_scale has shape \(5,\), which does not broadcast"):
            denoiser(shared, cond, uncond, guidance_scale=torch.ones(5))
        with pytest.raises(ValueError, match="needs uncond, which is None"):
            denoiser(shared, cond, guidance_scale=g)


def test_modality_and_audio(predictions):
    """`c + (g - 1)(c - u) + s (c - p) + (mu - 1)(c - m)` with scales of each output (LTX-2)."""
    u, c, p, x = predictions
    m = torch.randn(c.shape, generator=torch.Generator().manual_seed(1), dtype=c.dtype)
    branches = {"uncond": u, "cond": c, "skip": p, "modality": m}
    config = STGConfig.preset("ltx-2", layers=(1,), modality_scale=4.0, audio=AudioGuidance(7.0, 0.5, 2.0, 0.3))

    def expected(g, s, mu, r):
        clean = {name: x - SIGMA * v for name, v in branches.items()}
        c0 = clean["cond"]
        out = c0 + (g - 1) * (c0 - clean["uncond"]) + s * (c0 - clean["skip"]) + (mu - 1) * (c0 - clean["modality"])
        return (x - out * f_of(c0, out, r, batch=True)) / SIGMA

    options = {"g": 3.0, "latents": x, "sigma": SIGMA}
    torch.testing.assert_close(combined(config, branches, **options), expected(3.0, 1.0, 4.0, 0.0))
    torch.testing.assert_close(combined(config, branches, is_audio=True, **options), expected(7.0, 0.5, 2.0, 0.3))
    fallback = STGConfig.preset("ltx-2", layers=(1,), rescale=0.2, modality_scale=4.0, audio=AudioGuidance())
    torch.testing.assert_close(combined(fallback, branches, is_audio=True, **options), expected(3.0, 1.0, 4.0, 0.2))


@pytest.mark.parametrize("weak_pass", ["prompt", "negative_prompt", "uncond"])
@pytest.mark.parametrize("fields", [{}, {"rescale": R}, {"rescale": R, "rescale_over": "batch"}], ids=str)
def test_fused_combination_is_the_same(predictions, weak_pass, fields, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return combine_guidance(*args, **kwargs)

    combine_guidance = stg_kernels.combine_guidance
    monkeypatch.setattr(stg_kernels, "combine_guidance", counted)
    u, c, p, _ = (prediction.float() for prediction in predictions)
    branches = {"uncond": u, "cond": c, "skip": p, "modality": c.flip(1)}
    if weak_pass == "uncond":
        del branches["skip"]
    config = STGConfig(layers=(1,), weak_pass=weak_pass, modality_scale=3.0, **fields)
    fusion = Fusion(None, "off")
    fusion.is_on = True
    rows = torch.cat(list(branches.values()))
    fused = Combiner(config, fusion)(config.at(), tuple(branches), rows, G)
    expected = combined(config, branches)
    assert relative_error(fused, expected) < 1e-6
    assert len(calls) == 1


def test_outputs_have_their_own_latents_and_scales(transformer, monkeypatch):
    """A model of two outputs, video and audio: stands in for LTX-2."""
    shared, cond, uncond = tiny_inputs(2)
    config = STGConfig.preset("ltx-2", layers=(1,), rescale=R)
    with Denoiser(transformer, config) as denoiser:
        names, (rows,) = denoiser.predict(config.at(), shared, cond, uncond)
        spec = dataclasses.replace(denoiser.spec, velocity_of=("hidden_states", "audio"))
        monkeypatch.setattr(denoiser, "spec", spec)
        monkeypatch.setattr(denoiser, "config", dataclasses.replace(config, audio=AudioGuidance(guidance_scale=7.0)))
        monkeypatch.setattr(denoiser, "predict", lambda *_: (names, (rows, rows)))
        x, audio = shared["hidden_states"], 2 * shared["hidden_states"]
        sigmas = [torch.full((2, 24), 0.7), torch.full((2, 24), 0.5)]
        inputs = {**shared, "audio": audio}
        actual = denoiser(inputs, cond, uncond, guidance_scale=G, sigma=SIGMA, token_sigmas=sigmas)
        parts = dict(zip(names, rows.chunk(3), strict=True))
        for result, x0, level, g in zip(actual, (x, audio), (0.7, 0.5), (G, 7.0), strict=True):
            expected = combined(config, parts, g=g, latents=x0, sigma=level)
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weak_pass", ["prompt", "negative_prompt", "uncond"])
def test_skip_term_of_pipelines_that_apply_cfg_themselves(predictions, weak_pass):
    u, c, p, _ = predictions
    config = STGConfig(layers=(1,), weak_pass=weak_pass, scale=1.0 if weak_pass == "uncond" else S)
    branches = branches_of(config, u, c, p)
    rows = torch.cat(list(branches.values()))
    parts = Calls(SimpleNamespace()).with_skip_term(config.at(), tuple(branches), rows)
    expected = combined(config, branches)
    torch.testing.assert_close(parts["uncond"] + G * (parts["cond"] - parts["uncond"]), expected, rtol=1e-6, atol=1e-6)


def test_audio_in_steps_without_skips():
    audio = AudioGuidance(guidance_scale=7.0, rescale=0.3)
    config = STGConfig(layers=(1,), rescale=0.5, start=0.5, audio=audio)
    assert config.at(0.0).audio == AudioGuidance(guidance_scale=7.0, rescale=0.0)
    assert config.at(0.0).rescale == 0.0
    assert not config.at(0.0).is_plain
    assert STGConfig(layers=(1,), start=0.5, rescale_cfg=True, audio=audio).at(0.0).audio == audio


# facts: (preset or convention, changes, blocks, uncond) -> pass-equivalents; P1 still has its row in the skipped block,
# so that the published estimate is up to one block lower.
COSTS = [
    ("mochi", {}, 48, True, 2.271),
    ("mochi-native", {}, 48, True, 2.250),
    ("cogvideox-2b", {}, 30, True, 2.600),
    ("cogvideox-5b", {}, 42, True, 2.714),
    ("ltx-video-2b", {}, 28, True, 2.286),
    ("ltx-video-2b-lightricks", {}, 28, True, 2.30),
    ("ltx-video-2b-lightricks", {}, 28, False, 1.30),
    ("hunyuan-video", {}, 60, False, 1.950),
    ("hunyuan-video-2024", {}, 60, False, 1.617),
    ("wan-2.1-1.3b", {}, 30, True, 2.900),
    ("wan-2.1-14b", {}, 40, True, 2.925),
    ("wan", {"layers": (3, 8, 16)}, 30, True, 2.800),
    ("wan", {"layers": (3, 8, 16)}, 40, True, 2.850),
    ("wan-2.1-1.3b-community", {}, 30, True, 2.700),
    ("wan-2.1-14b-community", {}, 40, True, 2.775),
    ("ltx-2.3", {}, 48, True, 3.41),
    ("ltx-2.0", {}, 48, True, 3.39),
    ("ltx-2.3", {"modality_scale": 1.0}, 48, True, 2.41),
    ("ltx-2.3", {"modality_scale": 1.0}, 48, False, 1.41),
    ("wan-2.1-14b-slg", {}, 40, True, 1.975),
]


@pytest.mark.parametrize(("name", "changes", "blocks", "uncond", "cost"), COSTS)
def test_costs(name, changes, blocks, uncond, cost):
    config = STGConfig.preset(name, **changes)
    plan = Plan.build(config, blocks, uncond=uncond)
    if config.mode == "residual":
        assert round(plan.pass_equivalents, 3) == cost
    else:
        assert cost - 0.006 <= plan.pass_equivalents <= cost + 1 / blocks
    if name in PRESETS:
        assert PRESETS[name].blocks == blocks


def test_costs_of_factorised_models():
    axes = {"axes": ("spatial", "temporal"), "shares_attention": False}
    open_sora = Plan.build(PRESETS["open-sora"].config, 28, **axes)
    assert open_sora.pass_equivalents == pytest.approx(3.20, abs=0.02)
    svd = Plan.build(PRESETS["svd"].config, 16, prompt_block=-1, **axes)
    assert svd.pass_equivalents == pytest.approx(3.1, abs=0.05)


def test_costs_of_the_13b_passes():
    upscale = Plan.build(PRESETS["ltx-video-13b-upscale"].config, 48, uncond=False)
    assert 13 * upscale.pass_equivalents == pytest.approx(18.7, abs=13 / 48)
    plans = build_plans(PRESETS["ltx-video-13b"].config, 48)
    steps = [1, 2, 2, 5, 4, 5, 8]
    total = sum(n * plan.pass_equivalents for n, plan in zip(steps, plans, strict=True))
    assert total == pytest.approx(48.25, abs=24 / 48)


def test_presets_are_published_settings():
    for preset in PRESETS.values():
        assert preset.source
        assert preset.note
        assert preset.convention in CONVENTIONS
        for skip in preset.config.skips:
            assert max(skip.layers) < preset.blocks
        published = dict(CONVENTIONS[preset.convention].fields)
        differing = {field for field, value in published.items() if getattr(preset.config, field) != value}
        assert differing <= {"mode", "cfg_star", "arithmetic"}, preset.name
    for spec in supported():
        for blocks, name in spec.presets.items():
            assert (PRESETS[name].transformer, PRESETS[name].blocks) == (spec.transformer, blocks)


def test_names():
    assert STGConfig.preset("stg", layers=(34,), rescale=0.7).rescale_over == "batch"
    assert STGConfig.preset("mochi", scale=2.0).scale == 2.0
    with pytest.raises(ValueError, match=r"preset='slg-uncond' says how to combine.*name the blocks.*ltx-video-2b"):
        STGConfig.preset("slg-uncond")
    with pytest.raises(ValueError, match=r"'stg-r' is not known.* mochi.*with layers=\(...\), one of stg, ltx-video"):
        STGConfig.preset("stg-r")


DYNAMIC = {
    "name": "13b Dynamic",
    "skip_steps_sigma_threshold": 0.997,
    "cfg_star_rescale": True,
    "sigmas": [1.0, 0.9933, 0.9850, 0.9767, 0.9008, 0.6180],
    "cfg_values": [1, 6, 8, 6, 1, 1],
    "stg_scale_values": [0, 4, 4, 4, 2, 1],
    "stg_rescale_values": [1, 0.5, 0.5, 1, 1, 1],
    "stg_layers_indices": [[11, 25, 35, 39], [22, 35, 39], [28], [28], [28], [28]],
}


def comfyui_step(sigma):
    """STGGuiderAdvanced's choice: the smallest listed sigma that is not below, else the last."""
    higher = [s for s in DYNAMIC["sigmas"] if s >= sigma]
    i = DYNAMIC["sigmas"].index(min(higher)) if higher else -1
    return tuple(DYNAMIC[key][i] for key in ("cfg_values", "stg_scale_values", "stg_rescale_values"))


def test_comfyui_preset(tmp_path):
    folder = tmp_path / "presets"
    folder.mkdir()
    path = folder / "stg_advanced_presets.json"
    path.write_text(json.dumps([{"name": "Custom"}, DYNAMIC]))
    config = read_preset(DYNAMIC)
    assert read_presets(tmp_path) == read_presets(folder) == read_presets(path) == {"13b Dynamic": config}
    assert read_preset(path, "13b Dynamic") == config
    assert (config.space, config.zero_init, config.cfg_star, config.rescale_over) == ("x0", 0.997, True, "batch")
    assert config.at(sigma=0.998).is_zero
    for sigma in (0.997, 0.9933, 0.99, 0.985, 0.95, 0.9, 0.7, 0.618, 0.3):
        step = config.at(sigma=sigma)
        s = step.skips[0].scale if step.skips else 0
        assert (step.guidance_scale, s, step.rescale) == comfyui_step(sigma)
    assert config.at(sigma=0.99).skips[0].layers == (22, 35, 39)


def test_comfyui_preset_as_the_nodes_text():
    text = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in DYNAMIC.items()}
    assert read_preset(text) == read_preset(DYNAMIC)


def test_comfyui_sigma_above_all_listed():
    lists = {key: DYNAMIC[key][2:] for key in DYNAMIC if isinstance(DYNAMIC[key], list)}
    step = read_preset({**DYNAMIC, **lists, "skip_steps_sigma_threshold": 100.0}).at(sigma=0.999)
    assert (step.guidance_scale, step.skips[0].scale) == (1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg_values": [1, 6]}, r"'13b Dynamic' has lists of several lengths \(sigmas 6, cfg_values 2,"),
        ({"sigmas": "1.0, x"}, "'13b Dynamic': sigmas is no list"),
        ({"sigmas": 1.0}, "sigmas is no list"),
        ({"sigmas": [1.0, 0.9, 0.9, 0.8, 0.7, 0.6]}, "sigma strictly falling"),
        ({"sigmas": [2.0, 0.9933, 0.9850, 0.9767, 0.9008, 0.6180]}, "sigma=2.0.*between 0 and 1"),
        ({"cfg_values": [0.5] * 6}, "cfg_values holds 0.5; it must be 1"),
        ({"stg_layers_indices": [[]] * 6}, r"layers=\(\) is empty"),
        ({"stg_layers_indices": [28] * 6}, "layers=28 is not allowed"),
        ({"stg_scale_values": ["a"] * 6}, "scale='a'"),
        ({"stg_rescale_values": [2] * 6}, "rescale=2"),
        ({"cfg_star_rescale": "yes"}, "cfg_star='yes'"),
        ({"skip_steps_sigma_threshold": "high"}, "13b Dynamic"),
        ({"skip_steps_sigma_threshold": None}, "13b Dynamic"),
        ({"apply_apg": True}, "holds 'apply_apg'; it must hold skip_steps"),
    ],
    ids=str,
)
def test_comfyui_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        read_preset({**DYNAMIC, **change})


def test_comfyui_files(tmp_path):
    missing = {key: value for key, value in DYNAMIC.items() if key != "sigmas"}
    with pytest.raises(ValueError, match="has no sigmas; it must hold"):
        read_preset(missing)
    path = tmp_path / "some.json"
    with pytest.raises(ValueError, match=r"cannot read .*some.json: FileNotFoundError"):
        read_presets(path)
    path.write_text("[{")
    with pytest.raises(ValueError, match=r"cannot read .*some.json: JSONDecodeError"):
        read_presets(path)
    path.write_text('{"name": "2b"}')
    with pytest.raises(ValueError, match="holds no list of presets"):
        read_presets(path)
    path.write_text('[{"name": ["2b"]}]')
    with pytest.raises(ValueError, match="holds no list of presets"):
        read_presets(path)
    with pytest.raises(ValueError, match="skip_steps_sigma_threshold=None is not allowed"):
        read_preset({**DYNAMIC, "skip_steps_sigma_threshold": None})
    path.write_text(json.dumps([DYNAMIC]))
    with pytest.raises(ValueError, match=r"name='2b' is not a preset in .*choose one of 13b Dynamic"):
        read_preset(path, "2b")
