"""Graphs and the settings of the process: captured anew where one changed, none of its state in a graph."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from engine.tape import TapeCapture
from engine.tiny import tiny_inputs, tiny_transformer

from stg_engine import Denoiser, STGConfig
from stg_engine.runtime import graphs

CONFIG = STGConfig(layers=(2,))


@pytest.fixture(autouse=True)
def tapes(monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", TapeCapture)
    TapeCapture.made.clear()
    with torch.no_grad():
        yield TapeCapture.made


def counts(denoiser):
    return denoiser.graphs.captured, denoiser.graphs.replayed


def eager(transformer, inputs, **options):
    with Denoiser(transformer, CONFIG, **options) as denoiser:
        return denoiser(*inputs, guidance_scale=3.0)


def tiny(**options):
    return Denoiser(tiny_transformer(), CONFIG, graph=True, **options)


def test_another_function_in_the_place_of_torchs_attention(monkeypatch):
    inputs, own = tiny_inputs(1), torch.nn.functional.scaled_dot_product_attention
    with tiny(kernels="off") as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: 2 * own(*a, **k))
        result = denoiser(*inputs, guidance_scale=3.0)
        assert counts(denoiser) == (2, 0)
    assert torch.equal(result, eager(tiny_transformer(), inputs, kernels="off"))


def test_casts_of_autocast_are_in_the_graph():
    """Those that autocast keeps are gone behind it, and say nothing of a weight that is written later."""
    model, changed, inputs = tiny_transformer(), tiny_transformer(), tiny_inputs(1)
    with Denoiser(model, CONFIG, graph=True) as denoiser:
        for scale in (1.0, 3.0):
            for each in (model, changed):
                each.transformer_blocks[1].ff.net[2].weight.mul_(scale)
            with torch.autocast("cpu", torch.bfloat16):
                result = denoiser(*inputs, guidance_scale=3.0)
                assert torch.is_autocast_cache_enabled()
        assert counts(denoiser) == (1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(result, eager(changed, inputs))


@pytest.mark.parametrize(
    ("backend", "precision"), [(torch.backends.cuda.matmul, "tf32"), (torch.backends.cudnn.conv, "ieee")]
)
def test_precisions_by_their_newer_names(backend, precision):
    inputs, before = tiny_inputs(1), backend.fp32_precision
    with tiny() as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        try:
            backend.fp32_precision = precision
            denoiser(*inputs, guidance_scale=3.0)
        finally:
            backend.fp32_precision = before
        assert counts(denoiser) == (2, 0)


def test_another_device_has_its_own_captures(monkeypatch, tapes):
    """Work that runs on another device than the capture's stream is in no graph."""
    inputs = tiny_inputs(1)
    with tiny() as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        monkeypatch.setattr(denoiser.graphs, "_check", lambda _: torch.device("cpu", 0))
        denoiser(*inputs, guidance_scale=3.0)
        assert [capture.device for capture in tapes] == [torch.device("cpu"), torch.device("cpu", 0)]
        assert len(denoiser.graphs) == 1


def test_settings_of_the_process(monkeypatch):
    inputs = tiny_inputs(1)
    with tiny() as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        with torch.autocast("cpu", torch.bfloat16):
            low = denoiser(*inputs, guidance_scale=3.0)
            assert torch.equal(low, denoiser(*inputs, guidance_scale=3.0))
            assert torch.equal(low, eager(tiny_transformer(), inputs))
        monkeypatch.setenv("STG_ATTENTION", "torch")
        denoiser(*inputs, guidance_scale=3.0)
        assert counts(denoiser) == (3, 1)


def test_a_backend_chosen_for_one_processor():
    model, inputs = tiny_transformer(), tiny_inputs(1)
    with Denoiser(model, CONFIG, graph=True) as denoiser:
        denoiser(*inputs, guidance_scale=3.0)
        model.transformer_blocks[1].attn1.processor._attention_backend = AttentionBackendName._NATIVE_MATH
        denoiser(*inputs, guidance_scale=3.0)
        assert counts(denoiser) == (2, 0)
