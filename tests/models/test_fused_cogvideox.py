"""CogVideoX's fused block: what the block returns, one attention for all rows, modulation once per video."""

from types import SimpleNamespace

import pytest
import stg_kernels
import torch
from models.case import relative_error
from models.families.cogvideox import inputs, model

from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.fused import cogvideox

FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
VARIANT = "CogVideoX-5B"


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Fused blocks whether or not the compiled library is there."""
    monkeypatch.setattr(stg_kernels, "accelerates", lambda device: True)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kwargs", [None, {}, {"attention_mask": True}], ids=str)
@pytest.mark.parametrize("variant", ["CogVideoX-2B", VARIANT])
def test_the_block_returns_what_the_module_returns(variant, kwargs):
    transformer = model(variant, torch.float32)
    block, heads = transformer.transformer_blocks[1], transformer.config.num_attention_heads
    c = heads * transformer.config.attention_head_dim
    angles = torch.rand(10, c // heads // 2).repeat_interleave(2, dim=1)
    arguments = {
        "hidden_states": torch.randn(4, 10, c),
        "encoder_hidden_states": torch.randn(4, 3, c),
        "image_rotary_emb": (angles.cos(), angles.sin()) if variant == VARIANT else None,
        "attention_kwargs": kwargs and {"attention_mask": torch.randn(4, 1, 13)},
    }
    videos = torch.tensor([1, 0, 1, 0])
    run = SimpleNamespace(
        max_rows=None,
        videos_of_rows=lambda device: videos,
        once=lambda name, source, compute: compute(),
        skipping_attention=lambda index: [],
    )
    temb = torch.randn(2, 6)
    expected = block(temb=temb[videos], **arguments)
    actual = cogvideox.forward(run, 1, block, temb=temb, **arguments)
    for tensor, other in zip(actual, expected, strict=True):
        assert relative_error(tensor, other) <= FP32_RELATIVE


def test_rows_that_skip_attention_are_in_the_one_call_of_the_block(monkeypatch):
    calls = []

    def record(q, k, v, **kwargs):
        calls.append((len(q), list(kwargs["own_key_rows"])))
        return stg_kernels.branch_attention(q, k, v, **kwargs)

    monkeypatch.setattr(cogvideox, "branch_attention", record)
    transformer = model(VARIANT, torch.float32)
    with Denoiser(transformer, STGConfig(layers=(1, 3), mode="attention")) as denoiser:
        denoiser.branches(*inputs(VARIANT, 2, torch.float32))
    assert calls == [(4, []), (6, [4, 5]), (6, []), (6, [4, 5])]


@pytest.mark.parametrize(("max_rows", "videos"), [(None, [3]), (1, [1, 1, 1]), (2, [2, 1])])
def test_modulation_is_computed_once_per_video(max_rows, videos):
    transformer, calls = model(VARIANT, torch.float32), []
    transformer.transformer_blocks[2].norm1.linear.register_forward_pre_hook(
        lambda module, args: calls.append(len(args[0]))
    )
    with Denoiser(transformer, STGConfig(layers=(1,), extra_skips=(Skip((2,)),)), max_rows=max_rows) as denoiser:
        denoiser.branches(*inputs(VARIANT, 3, torch.float32))
    assert calls == videos
