"""Mochi's fused block: prompt masks as lengths, one attention for all rows, what the block returns for padding."""

from types import SimpleNamespace

import pytest
import stg_kernels
import torch
from models.case import relative_error
from models.families.mochi import inputs, model

from stg_engine import Denoiser, Skip, STGConfig
from stg_engine.fused import mochi

FP32_RELATIVE = 2e-6  # DESIGN: fp32 on CPU
ROWS = STGConfig(layers=(1, 2), extra_skips=(Skip((1, 3), mode="attention"),))
MASKS = {
    "padded": [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    "full": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "empty": [[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
}


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Fused blocks whether or not the compiled library is there."""
    monkeypatch.setattr(stg_kernels, "accelerates", lambda device: True)
    with torch.no_grad():
        yield


@pytest.fixture
def attention_calls(monkeypatch):
    """Rows and keyword arguments of every call of the op."""
    calls = []

    def record(q, k, v, **kwargs):
        calls.append({"rows": len(q), **kwargs})
        return stg_kernels.branch_attention(q, k, v, **kwargs)

    monkeypatch.setattr(mochi, "branch_attention", record)
    return calls


@pytest.mark.parametrize("max_rows", [None, 1])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_gives_what_the_modules_give(name, max_rows, attention_calls):
    transformer, (shared, cond, uncond) = model(torch.float32), inputs(2, torch.float32)
    cond["encoder_attention_mask"] = torch.tensor(MASKS[name], dtype=torch.bool)
    uncond["encoder_attention_mask"] = torch.tensor(MASKS["full" if name == "padded" else name], dtype=torch.bool)
    with Denoiser(transformer, ROWS, max_rows=max_rows, kernels="off") as denoiser:
        expected = denoiser.branches(shared, cond, uncond)
    with Denoiser(transformer, ROWS, max_rows=max_rows) as denoiser:
        actual = denoiser.branches(shared, cond, uncond)
        assert any("diffusers" in line for line in denoiser.fusion.attention()) == (name in ("holes", "left"))
    for branch, tensor in expected.items():
        assert relative_error(actual[branch], tensor) <= FP32_RELATIVE, branch
    assert bool(attention_calls) == (name not in ("holes", "left"))
    lengths = [call["key_lengths"] is not None for call in attention_calls]
    assert any(lengths) == (name in ("padded", "empty"))
    if name == "padded" and max_rows == 1:  # a row without padding is told so, whatever stands beside it
        assert not all(lengths)


def test_rows_that_skip_attention_are_in_the_one_call_of_the_block(attention_calls):
    with Denoiser(model(torch.float32), STGConfig(layers=(1, 3), mode="attention")) as denoiser:
        denoiser.branches(*inputs(2, torch.float32))
    assert [(call["rows"], list(call["own_key_rows"])) for call in attention_calls] == [
        (4, []),
        (6, [4, 5]),
        (6, []),
        (6, [4, 5]),
    ]


def test_padding_is_not_read():
    transformer, (shared, cond, _) = model(torch.float32), inputs(1, torch.float32)
    cond["encoder_attention_mask"] = torch.tensor([[1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    results, blocks = [], transformer.transformer_blocks
    for value in (0.0, 1e4):
        blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs, value=value: (
                args,
                {**kwargs, "encoder_hidden_states": padded(kwargs, value)},
            ),
            with_kwargs=True,
        )
        with Denoiser(transformer, ROWS, execution="serial") as denoiser:
            results.append(denoiser.branches(shared, cond))
            assert denoiser.fusion.is_on
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor), name


def padded(arguments, value):
    keep = arguments["encoder_attention_mask"][..., None]
    return torch.where(keep, arguments["encoder_hidden_states"], value)


@pytest.mark.parametrize("layer", [0, 3])
def test_the_block_returns_what_the_module_returns(layer):
    """Padding, too: what the model returns does not depend on it."""
    block = model(torch.float32).transformer_blocks[layer]
    lengths = torch.tensor([2, 6, 0], dtype=torch.int32)
    arguments = {
        "hidden_states": torch.randn(3, 10, 16),
        "encoder_hidden_states": torch.randn(3, 6, 16),
        "temb": torch.randn(3, 16),
        "encoder_attention_mask": torch.arange(6) < lengths[:, None],
        "image_rotary_emb": torch.randn(2, 10, 2, 4).unbind(),
    }
    run = SimpleNamespace(
        is_padded=True, once=lambda name, source, compute: compute(), skipping_attention=lambda index: []
    )
    expected = block(**arguments)
    actual = mochi.forward(run, layer, block, **arguments, key_lengths=lengths)
    for tensor, other in zip(actual, expected, strict=True):
        assert relative_error(tensor, other) <= FP32_RELATIVE
