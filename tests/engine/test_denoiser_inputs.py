"""Wrong settings and inputs are refused with the field, the value and what is allowed."""

import pytest
import torch
from engine.tiny import tiny_inputs, tiny_transformer
from torch import nn

from stg_engine import Denoiser, STGConfig


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


def test_unknown_model():
    with pytest.raises(TypeError, match="no ModelSpec for Linear; supported transformers: LTXVideoTransformer3DModel"):
        Denoiser(nn.Linear(1, 1), STGConfig(layers=(0,)))


def test_second_denoiser(transformer, denoiser):
    with pytest.raises(ValueError, match="has a Denoiser already"):
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


def test_step_position_is_asked_for(transformer):
    shared, cond, uncond = tiny_inputs()
    with (
        Denoiser(transformer, STGConfig(layers=(1,), stop=0.5)) as denoiser,
        pytest.raises(ValueError, match="progress=None"),
    ):
        denoiser(shared, cond, uncond, guidance_scale=3.0)


def test_a_hook_lost_with_another_is_an_error():
    from diffusers import FirstBlockCacheConfig

    transformer = tiny_transformer()
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with torch.no_grad(), Denoiser(transformer, STGConfig(layers=(1,))) as denoiser:
        transformer.disable_cache()
        with pytest.raises(RuntimeError, match="detach and attach again"):
            denoiser(*tiny_inputs(), guidance_scale=3.0)


def test_feature_cache_is_refused(transformer, denoiser):
    from diffusers import FirstBlockCacheConfig

    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(RuntimeError, match="disable_cache"):
            denoiser(*tiny_inputs(), guidance_scale=3.0)
    finally:
        transformer.disable_cache()
    denoiser(*tiny_inputs(), guidance_scale=3.0)
