"""LTX-2: the modality branch, both outputs, and what is kept of the prompt."""

import pytest
import torch
from models.case import relative_error
from models.families import ltx2, mochi

from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.hooks import hook_of

FP32_RELATIVE = 2e-6
VARIANTS = ("LTX-2", "LTX-2.3")
OUTPUTS = 2


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def config_of(layers=(2,), **changes):
    return STGConfig(**{"layers": layers, "mode": "attention", "modality_scale": 3.0} | changes)


def passes_of(variant, model, videos, shared, cond, uncond, config):
    """Every branch run alone, video by video: of each output {branch: [B, ...]}."""
    case = next(case for case in ltx2.CASES if case.name == variant)
    results = case.passes(model, [skip for skip in config.skips if skip.scale > 0], shared, cond, uncond)
    if not any(skip.scale > 0 for skip in config.skips):
        results = {name: results[name] for name in ("cond", "uncond")}
    isolated = case.passes(model, [], shared | {"isolate_modalities": True}, cond, None)
    return results | {"modality": isolated["cond"]}


@pytest.mark.parametrize("execution", ["batched", "serial"])
@pytest.mark.parametrize("layers", [(), (0,), (1, 3)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_modality_branch_is_the_isolated_pass(variant, layers, execution):
    model = ltx2.model(variant, torch.float32)
    shared, cond, uncond = ltx2.inputs(variant, 2, torch.float32)
    config = config_of(layers) if layers else config_of((0,), scale=0.0)
    expected = passes_of(variant, model, 2, shared, cond, uncond, config)
    with Denoiser(model, config, execution=execution, kernels="off") as denoiser:
        for _ in range(2):
            actual = denoiser.branches(shared, cond, uncond)
            for i in range(OUTPUTS):
                assert list(actual[i]) == ["uncond", "cond", *["skip"][: len(layers)], "modality"]
                assert set(expected) == set(actual[i])
                for name, tensor in actual[i].items():
                    other = expected[name][i]
                    same = torch.equal(tensor, other) if execution == "serial" else False
                    assert same or (execution == "batched" and relative_error(tensor, other) <= FP32_RELATIVE), name
    for i in range(OUTPUTS):
        assert relative_error(expected["modality"][i], expected["cond"][i]) > 100 * FP32_RELATIVE


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_of_both_outputs(rescale):
    model = ltx2.model("LTX-2.3", torch.float32)
    shared, cond, uncond = ltx2.inputs("LTX-2.3", 2, torch.float32)
    config = config_of((1,), scale=1.5, rescale=rescale)
    passes = passes_of("LTX-2.3", model, 2, shared, cond, uncond, config)
    with Denoiser(model, config) as denoiser:
        guided = denoiser(shared, cond, uncond, guidance_scale=4.0)
        assert set(denoiser.differences) == {"skip", "modality"}
        assert min(denoiser.differences.values()) > 0
    for i, output in enumerate(guided):
        u, c, p, m = (passes[name][i] for name in ("uncond", "cond", "skip", "modality"))
        expected = u + 4.0 * (c - u) + 1.5 * (c - p) + 2.0 * (c - m)
        ratio = torch.stack([a.std() / b.std() for a, b in zip(c, expected, strict=True)])[:, None, None]
        expected = expected * (rescale * ratio + 1 - rescale)
        assert relative_error(output, expected) <= 10 * FP32_RELATIVE


def test_first_block_attends_once_for_uncond_cond_and_modality():
    model = ltx2.model("LTX-2.3", torch.float32)
    shared, cond, uncond = ltx2.inputs("LTX-2.3", 2, torch.float32)
    rows = {}
    with Denoiser(model, config_of((2,)), kernels="off") as denoiser:
        plan = denoiser.plans()
        for index, block in enumerate(denoiser.blocks):
            for name in ("attn1", "audio_attn1", "audio_to_video_attn", "video_to_audio_attn"):
                below = hook_of(getattr(block, name)).fn_ref

                def spy(*args, key=(index, name), inner=below.original_forward, **arguments):
                    rows[key] = len(args[0] if args else arguments["hidden_states"])
                    return inner(*args, **arguments)

                below.original_forward = spy
        denoiser.branches(shared, cond, uncond)
    assert dict(plan.shared_attention(0)) == {"uncond": "cond", "modality": "cond"}
    for name in ("attn1", "audio_attn1"):
        assert [rows[i, name] for i in range(4)] == [2, 6, 6, 8]  # skipping rows run no attention in block 2
    for name in ("audio_to_video_attn", "video_to_audio_attn"):
        assert [rows[i, name] for i in range(4)] == [4, 4, 6, 6]  # modality's rows never
    assert [len(names) for names in plan.rows] == [3, 3, 4, 4]


def test_model_of_one_modality_refuses_modality_guidance():
    with pytest.raises(ValueError, match=r"modality_scale=3\.0 is not allowed: Mochi has one modality"):
        Denoiser(mochi.model(torch.float32), STGConfig(layers=(1,), modality_scale=3.0))
    with pytest.raises(ValueError, match=r"modality_scale=0\.5 is not allowed; .* at least 1"):
        STGConfig(layers=(1,), modality_scale=0.5)


def test_replaced_attention_between_modalities_is_noticed():
    """Its hook is gone, so that the modality branch would not be isolated there."""
    model, other = (ltx2.model("LTX-2", torch.float32) for _ in range(2))
    inputs = ltx2.inputs("LTX-2", 1, torch.float32)
    with Denoiser(model, config_of(), kernels="off") as denoiser:
        model.transformer_blocks[1].audio_to_video_attn = other.transformer_blocks[1].audio_to_video_attn
        with pytest.raises(RuntimeError, match="was replaced; detach and attach again"):
            denoiser.branches(*inputs)


def test_modality_guidance_follows_start_and_stop():
    config = config_of((1,), scale=0.0, start=0.5, rescale=0.3)
    assert config.is_on
    assert (config.at(0.5).weak, config.at(0.5).rescale) == ((("modality", 2.0),), 0.3)
    assert config.at(0.25).is_plain
    assert not config_of((1,), scale=0.0, modality_scale=1.0).is_on


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_kept_of_the_prompt_does_not_grow(variant):
    model = ltx2.model(variant, torch.float32)
    shared, cond, uncond = ltx2.inputs(variant, 2, torch.float32)
    counts, calls = [], []
    modules = [model.transformer_blocks[1].attn2.to_k, model.transformer_blocks[1].audio_attn2.to_v]
    modules += [model.caption_projection] if variant == "LTX-2" else []
    with Denoiser(model, config_of(), kernels="off") as denoiser:
        for module in modules:
            below = hook_of(module).fn_ref

            def spy(x, inner=below.original_forward):
                calls.append(len(x))
                return inner(x)

            below.original_forward = spy
        for step in range(4):
            now = {"timestep": shared["timestep"] - step, "audio_timestep": shared["audio_timestep"] - step}
            if variant == "LTX-2.3":
                now["sigma"] = shared["sigma"] - step
            denoiser.branches(shared | now, cond, uncond)
            counts.append(len(denoiser.memo))
    assert len(set(counts)) == 1
    assert len(calls) == len(modules) * (1 if variant == "LTX-2" else 4)  # 2.3 modulates the prompt by the timestep


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_of_the_picture(variant):
    """Attention between reference tokens, and marked keyframes, as IC-LoRA and the keyframe pipelines pass them."""
    model = ltx2.model(variant, torch.float32, use_keyframes_abs_pos_embedding=True)
    shared, cond, uncond = ltx2.inputs(variant, 2, torch.float32)
    size, config = shared["hidden_states"].shape[1], config_of((1,))
    generator = torch.Generator().manual_seed(2)
    shared["video_self_attention_mask"] = (torch.rand(2, size, size, generator=generator) > 0.5).float()
    shared["video_keyframes_mask"] = (torch.rand(2, size, 1, generator=generator) > 0.5).float()
    expected = passes_of(variant, model, 2, shared, cond, uncond, config)
    for max_rows in (None, 1):
        with Denoiser(model, config, max_rows=max_rows) as denoiser:
            for i, branches in enumerate(denoiser.branches(shared, cond, uncond)):
                for name, tensor in branches.items():
                    assert relative_error(tensor, expected[name][i]) <= FP32_RELATIVE, name


def test_perturbed_attention_of_two_models_is_one():
    """diffusers drops its STG pass where the config says `perturbed_attn=False` (LTX-2.0); the weights have it."""
    model = ltx2.model("LTX-2", torch.float32)
    same = ltx2.model("LTX-2", torch.float32, perturbed_attn=True)
    shared, cond, _ = ltx2.inputs("LTX-2", 1, torch.float32)
    call = shared | cond | {"return_dict": False, "spatio_temporal_guidance_blocks": [2]}
    with Denoiser(model, STGConfig(layers=(2,), mode="attention")) as denoiser:
        skip = [branches["skip"] for branches in denoiser.branches(shared, cond)]
        plain = model(**call)
    for tensor, other, silent in zip(skip, same(**call), plain, strict=True):
        assert relative_error(tensor, other) <= FP32_RELATIVE
        assert relative_error(silent, other) > 100 * FP32_RELATIVE


def test_several_branches_in_chunks():
    model = ltx2.model("LTX-2", torch.float32)
    shared, cond, uncond = ltx2.inputs("LTX-2", 3, torch.float32)
    config = config_of((0, 2), extra_skips=(Skip((0,), mode="residual"),))
    expected = passes_of("LTX-2", model, 3, shared, cond, uncond, config)
    with Denoiser(model, config, max_rows=4, kernels="off") as denoiser:
        for i, branches in enumerate(denoiser.branches(shared, cond, uncond)):
            assert set(branches) == set(expected)
            for name, tensor in branches.items():
                assert relative_error(tensor, expected[name][i]) <= FP32_RELATIVE, name


@pytest.mark.parametrize("case", ltx2.CASES, ids=str)
def test_serial_gives_no_layer_more_than_one_row(case, monkeypatch):
    """Sums of other sizes are other sums, though not on every machine: linear layers see the shapes of passes alone."""
    model, config, seen = case.model(torch.float32), config_of((2,)), set()
    shared, cond, uncond = case.inputs(2, torch.float32)
    names = {id(weight): name for name, weight in model.named_parameters()}
    inner = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        seen.add((names[id(weight)], x.shape))
        return inner(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    passes_of(case.name, model, 2, shared, cond, uncond, config)
    alone = set(seen)
    with Denoiser(model, config, execution="serial", kernels="off") as denoiser:
        denoiser.branches(shared, cond, uncond)
    assert len(alone) > 100
    assert seen == alone


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_all_branches_share_runs_once_per_step(variant):
    model = ltx2.model(variant, torch.float32)
    shared, cond, uncond = ltx2.inputs(variant, 2, torch.float32)
    rows = {}
    ropes = ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope")
    gates = ("video_scale_shift", "video_a2v_gate", "audio_scale_shift", "audio_v2a_gate")
    times = ["time_embed", "audio_time_embed", *(f"av_cross_attn_{name}" for name in gates)]
    times += ["prompt_adaln", "audio_prompt_adaln"] if variant == "LTX-2.3" else []
    with Denoiser(model, config_of(), kernels="off") as denoiser:
        for name in ("proj_in", "audio_proj_in", *ropes, *times):
            below = hook_of(getattr(model, name)).fn_ref

            def spy(x, *args, name=name, inner=below.original_forward, **arguments):
                rows[name] = len(x)
                return inner(x, *args, **arguments)

            below.original_forward = spy
        denoiser.branches(shared, cond, uncond)
    assert set(rows.values()) == {2}
    assert len(rows) == 6 + len(times)
