"""Wrong settings and inputs are refused with the field, the value and what is allowed."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import (
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
)
from engine.tiny import tiny_inputs, tiny_transformer
from torch import nn

from stg_engine import Denoiser, STGConfig, hooks
from stg_engine.models import base
from stg_engine.models.ltx import LTX_VIDEO

FIRST_BLOCK_CACHE = FirstBlockCacheConfig(threshold=0.1)


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer()


@pytest.fixture
def denoiser(transformer):
    with torch.no_grad(), Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
        yield denoiser


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (STGConfig(layers=(4,)), {}, r"layers=\(4,\).*4 blocks, 0 to 3"),
        (STGConfig(layers=(1,), axis="spatial"), {}, "axis='spatial'.*no factorised attention"),
        (None, {}, "config=None.*no preset was published for LTX-Video with 4 blocks"),
        (STGConfig(layers=(1,)), {"execution": "parallel"}, "execution='parallel'.*'batched', 'serial'"),
        (STGConfig(layers=(1,)), {"kernels": "fast"}, "kernels='fast'.*'auto', 'off'"),
        (STGConfig(layers=(1,)), {"max_rows": 0}, "max_rows=0.*at least 1"),
        (STGConfig(layers=(1,)), {"max_rows": 2, "execution": "serial"}, "max_rows=2.*serial"),
        (STGConfig.preset("ltx-video-13b"), {}, r"layers=\(22, 35, 39\).*4 blocks"),
    ],
)
def test_settings(transformer, config, options, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(transformer, config, **options)
    assert "_diffusers_hook" not in vars(transformer.transformer_blocks[0])


def test_config_type(transformer):
    with pytest.raises(TypeError, match="must be an STGConfig"):
        Denoiser(transformer, {"layers": (1,)})


def test_a_spec_with_a_wrong_path_of_the_self_attention(transformer, monkeypatch):
    """A path that is not there is left out: nothing would be skipped."""
    monkeypatch.setattr("stg_engine.denoiser.spec_of", lambda _: replace(LTX_VIDEO, self_attention=("attention",)))
    with pytest.raises(ValueError, match="mode='attention' is not allowed: the blocks have no attention"):
        Denoiser(transformer, STGConfig(layers=(1,), mode="attention"))
    Denoiser(transformer, STGConfig(layers=(1,))).detach()


def test_unknown_model():
    with pytest.raises(
        TypeError, match=r"no ModelSpec for Linear; supported transformers: .*\bLTXVideoTransformer3DModel"
    ):
        Denoiser(nn.Linear(1, 1), STGConfig(layers=(0,)))


def test_second_denoiser(transformer, denoiser):
    with pytest.raises(ValueError, match="on it already"):
        Denoiser(transformer, STGConfig(layers=(1,)))


def test_detached(transformer):
    denoiser = Denoiser(transformer, STGConfig(layers=(1,)))
    denoiser.detach()
    with pytest.raises(RuntimeError, match="detached"):
        denoiser(*tiny_inputs(), guidance_scale=3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, c, u: s.update(sigma=1.0), "shared holds 'sigma', which is not an argument of LTXVideo"),
        (lambda s, c, u: s.update(return_dict=False), "shared holds 'return_dict'"),
        (lambda s, c, u: s.update(encoder_hidden_states=c["encoder_hidden_states"]), "it belongs in cond and uncond"),
        (lambda s, c, u: c.update(timestep=s["timestep"]), "cond holds 'timestep'; it belongs in shared"),
        (lambda s, c, u: u.pop("encoder_attention_mask"), "uncond holds .*must hold what cond holds"),
        (lambda s, c, u: s.update(timestep=s["timestep"][:1]), r"shared\['timestep'\] has 1 rows; hidden_states has 2"),
        (lambda s, c, u: c.update(encoder_attention_mask=c["encoder_attention_mask"][:1]), "has 1 rows"),
        (lambda s, c, u: s.update(timestep=s["timestep"][0]), r"shared\['timestep'\] is a single number"),
        (lambda s, c, u: u.update(encoder_attention_mask=None), "uncond.* is None and cond has one"),
        (lambda s, c, u: c.update(encoder_attention_mask=None), "cond.* is None and uncond has one"),
        (
            lambda s, c, u: u.update(encoder_hidden_states=u["encoder_hidden_states"][:, :3]),
            "pad the prompts to one length",
        ),
    ],
)
def test_inputs(denoiser, change, message):
    inputs = tiny_inputs(2)
    change(*inputs)
    with pytest.raises(ValueError, match=message):
        denoiser(*inputs, guidance_scale=3.0)


def test_guidance_scale_and_uncond_go_together(denoiser):
    shared, cond, uncond = tiny_inputs()
    with pytest.raises(ValueError, match="guidance_scale=None is not allowed with uncond"):
        denoiser(shared, cond, uncond)
    with pytest.raises(ValueError, match=r"guidance_scale=3.0 needs uncond"):
        denoiser(shared, cond, guidance_scale=3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.__setitem__(1, torch.ones(1)), "cond is a Tensor; it must be a dict"),
        (lambda inputs: inputs[0].update(timestep=500.0), r"shared\['timestep'\] is a float; it must be a tensor"),
    ],
)
def test_input_types(denoiser, change, message):
    inputs = list(tiny_inputs())
    change(inputs)
    with pytest.raises(TypeError, match=message):
        denoiser(*inputs, guidance_scale=3.0)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, "3"])
def test_guidance_scale(denoiser, scale):
    with pytest.raises(ValueError, match=f"guidance_scale={scale!r} is not allowed; it must be a finite number"):
        denoiser(*tiny_inputs(), guidance_scale=scale)


def test_step_position_is_asked_for(transformer):
    shared, cond, uncond = tiny_inputs()
    with (
        Denoiser(transformer, STGConfig(layers=(1,), stop=0.5)) as denoiser,
        pytest.raises(ValueError, match="progress=None"),
    ):
        denoiser(shared, cond, uncond, guidance_scale=3.0)


def test_a_hook_lost_with_another_is_an_error():
    transformer = tiny_transformer()
    transformer.enable_cache(FIRST_BLOCK_CACHE)
    with torch.no_grad(), Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
        transformer.disable_cache()
        with pytest.raises(RuntimeError, match="detach and attach again"):
            denoiser(*tiny_inputs(), guidance_scale=3.0)


def test_feature_cache_is_refused(transformer, denoiser):
    transformer.enable_cache(FIRST_BLOCK_CACHE)
    try:
        with pytest.raises(RuntimeError, match="disable_cache"):
            denoiser(*tiny_inputs(), guidance_scale=3.0)
    finally:
        transformer.disable_cache()
    denoiser(*tiny_inputs(), guidance_scale=3.0)


CACHES = {
    "first_block": lambda model: apply_first_block_cache(model, FIRST_BLOCK_CACHE),
    "mag": lambda model: apply_mag_cache(model, MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4)),
    "broadcast": lambda model: apply_pyramid_attention_broadcast(
        model, PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=int)
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_feature_cache_applied_by_a_function_is_refused(cache):
    transformer = tiny_transformer()
    with torch.no_grad(), Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
        CACHES[cache](transformer)
        with pytest.raises(RuntimeError, match="feature cache is on the transformer"):
            denoiser(*tiny_inputs(), guidance_scale=3.0)


def test_a_cache_outlives_the_denoiser():
    def run(transformer):
        shared, cond, _ = tiny_inputs()
        with torch.no_grad(), transformer.cache_context("cond"):
            return [transformer(**shared, **cond, return_dict=False)[0] for _ in range(2)]

    blocks_run = []
    results = []
    for with_denoiser in (False, True):
        transformer = tiny_transformer()
        transformer.transformer_blocks[2].ff.register_forward_hook(lambda *_: blocks_run.append(1))
        denoiser = Denoiser(transformer, STGConfig(layers=(1,))) if with_denoiser else None
        transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        if denoiser is not None:
            denoiser.detach()
        results.append(run(transformer))
        assert len(blocks_run) == 1, "the second forward must come from the cache"
        blocks_run.clear()
    for plain, detached in zip(*results, strict=True):
        assert torch.equal(plain, detached)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("compiled", ["whole", "blocks"])
def test_compiled_modules_are_refused(compiled, when):
    transformer = tiny_transformer()
    compile_it = transformer.compile if compiled == "whole" else transformer.compile_repeated_blocks
    if when == "before":
        compile_it()
        with pytest.raises(RuntimeError, match="compiled"):
            Denoiser(transformer, STGConfig(layers=(1,)))
        return
    with torch.no_grad(), Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
        compile_it()
        with pytest.raises(RuntimeError, match="compiled"):
            denoiser(*tiny_inputs(), guidance_scale=3.0)


def test_blocks_replaced_by_compiled_ones_are_refused():
    transformer = tiny_transformer()
    transformer.transformer_blocks[0] = torch.compile(transformer.transformer_blocks[0])
    with pytest.raises(TypeError, match=r"torch\.compile modules"):
        Denoiser(transformer, STGConfig(layers=(1,)))


def test_gradient_checkpointing_is_refused_where_gradients_are_recorded():
    transformer = tiny_transformer()
    transformer.enable_gradient_checkpointing()
    with Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
        with pytest.raises(RuntimeError, match="disable_gradient_checkpointing"):
            denoiser(*tiny_inputs(), guidance_scale=3.0)
        with torch.no_grad():
            denoiser(*tiny_inputs(), guidance_scale=3.0)


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps], ids=lambda take: take.__name__)
def test_a_hooked_transformer_is_not_copied(transformer, denoiser, take):
    with pytest.raises(TypeError, match="detach it before you copy"):
        take(transformer)


@pytest.mark.parametrize("which", ["block", "attention"])
def test_replaced_modules_are_noticed(which):
    transformer, other = tiny_transformer(), tiny_transformer(seed=1)
    with torch.no_grad(), Denoiser(transformer, STGConfig(layers=(1,), mode="attention")) as denoiser:
        kept = transformer.transformer_blocks[1]
        if which == "block":
            transformer.transformer_blocks[1] = other.transformer_blocks[1]
        else:
            attention, kept.attn1 = kept.attn1, other.transformer_blocks[1].attn1
        with pytest.raises(RuntimeError, match="was replaced; detach and attach again"):
            denoiser(*tiny_inputs(), guidance_scale=3.0)
        if which == "block":
            transformer.transformer_blocks[1] = kept
        else:
            kept.attn1 = attention


@pytest.mark.parametrize("lost", ["transformer_blocks.1", "transformer_blocks.3", "transformer_blocks.1.attn1"])
def test_a_forward_put_in_the_place_of_a_hook_is_noticed(lost):
    """Where all branches have rows, the block would run on them, and skip nothing."""
    transformer = tiny_transformer()
    with torch.no_grad(), Denoiser(transformer, STGConfig(layers=(0, 1, 3), mode="attention")) as denoiser:
        expected = denoiser(*tiny_inputs(), guidance_scale=3.0)
        module = transformer.get_submodule(lost)
        hooked = vars(module).pop("forward")
        with pytest.raises(RuntimeError, match="did not run through stg_engine's hook"):
            denoiser(*tiny_inputs(), guidance_scale=3.0)
        module.forward = hooked
        assert torch.equal(denoiser(*tiny_inputs(), guidance_scale=3.0), expected)


def test_no_videos(denoiser):
    shared, cond, uncond = tiny_inputs()
    empty = [{k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in i.items()} for i in (shared, cond, uncond)]
    with pytest.raises(ValueError, match=r"shared\['hidden_states'\] has no rows"):
        denoiser(*empty, guidance_scale=3.0)


def test_a_subclass_that_hands_everything_on():
    class Sub(type(tiny_transformer())):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    transformer = tiny_transformer()
    with torch.no_grad(), Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
        expected = denoiser(*tiny_inputs(), guidance_scale=3.0)
    transformer.__class__ = Sub
    with torch.no_grad(), Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
        assert torch.equal(denoiser(*tiny_inputs(), guidance_scale=3.0), expected)


def test_a_failed_installation_leaves_no_hooks(monkeypatch):
    transformer = tiny_transformer()
    installed = []

    def fail_late(module, hook, install=hooks.install):
        installed.append(module)
        return 1 / 0 if len(installed) == 5 else install(module, hook)

    monkeypatch.setattr("stg_engine.denoiser.install", fail_late)
    with pytest.raises(ZeroDivisionError):
        Denoiser(transformer, STGConfig(layers=(1,)))
    assert not [module for module in transformer.modules() if "_diffusers_hook" in vars(module)]


def test_differences_are_those_of_the_first_step(denoiser):
    shared, cond, uncond = tiny_inputs()
    denoiser.differences.clear()
    denoiser(shared, cond, uncond, guidance_scale=3.0)
    first = denoiser.differences["skip"]
    denoiser({**shared, "hidden_states": 2 * shared["hidden_states"]}, cond, uncond, guidance_scale=3.0)
    assert denoiser.differences["skip"] is first


def test_modules_called_outside_a_guided_forward(transformer):
    x = torch.ones(2, 24, 8)
    plain = transformer.rope(hidden_states=x, num_frames=2, height=3, width=4), transformer.proj_in(input=x)
    with Denoiser(transformer, STGConfig(layers=(1,))):
        hooked = transformer.rope(hidden_states=x, num_frames=2, height=3, width=4), transformer.proj_in(input=x)
    torch.testing.assert_close(hooked, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ("layers.*",)}, r"blocks=\('layers.\*',\) .* is nothing in this LTXVideoTransformer3DModel"),
        ({"blocks": ("transformer_blocks.*", "transformer_blocks.*")}, "names a block twice"),
        (
            {"latents": ("hidden_states", "timesteps")},
            "'timesteps' .* no argument of LTXVideoTransformer3DModel",
        ),
        ({"prompt": ("text",)}, "'text' .* no argument of LTXVideoTransformer3DModel.forward"),
        ({"streams": ("x",)}, "'x' .* no argument of LTXVideoTransformerBlock.forward; it has hidden_states"),
    ],
)
def test_a_spec_that_does_not_fit_the_model_is_an_error(monkeypatch, changes, message):
    transformer = tiny_transformer()
    spec = replace(base.spec_of(transformer), **changes)
    monkeypatch.setitem(base._SPECS, spec.transformer, spec)
    with pytest.raises(ValueError, match=message):
        Denoiser(transformer, STGConfig(layers=(1,)))
