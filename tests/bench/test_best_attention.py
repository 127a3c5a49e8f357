"""Which attention a baseline gets."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from engine.tiny import tiny_inputs, tiny_transformer
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from stg_engine.bench import attention, timing
from stg_engine.bench.attention import Attention
from stg_engine.reference import passes_one_by_one

GPU = SimpleNamespace(type="cuda")  # what is called below runs on the CPU


def backends_of(model):
    return [module.processor._attention_backend for module in model.modules() if hasattr(module, "processor")]


def test_a_backend_is_this_models_alone_and_for_as_long():
    model, other = tiny_transformer(), tiny_transformer()
    active = _AttentionBackendRegistry.get_active_backend()[0]
    with Attention("_native_flash").on(model):
        assert set(backends_of(model)) == {AttentionBackendName._NATIVE_FLASH}
        assert set(backends_of(other)) == {None}
        assert _AttentionBackendRegistry.get_active_backend()[0] == active
    assert set(backends_of(model)) == {None}


def test_an_order_holds_in_a_call():
    with Attention(first="efficient").on(tiny_transformer()) as context:
        before = torch._C._get_sdp_priority_order()
        with context():
            assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.EFFICIENT_ATTENTION)
            assert SDPBackend.MATH in _cur_sdpa_kernel_backends()
        assert torch._C._get_sdp_priority_order() == before


def test_candidates_are_exact_and_there():
    found = attention.candidates(tiny_transformer())
    assert [str(each) for each in found[:4]] == [
        "diffusers native",
        "SDPA, cudnn first",
        "SDPA, flash first",
        "SDPA, efficient first",
    ]
    assert Attention("_native_flash") in found
    assert Attention("_flash_3") not in found  # not installed
    assert attention.candidates(torch.nn.Linear(1, 1)) == found[:4]


@torch.no_grad()
@pytest.mark.parametrize("is_wrong", [False, True])
def test_the_fastest_of_those_that_give_the_same(monkeypatch, is_wrong):
    model, (shared, cond, _) = tiny_transformer(), tiny_inputs()
    wrong, raises, slow = Attention("_native_flash"), Attention("_native_cudnn"), Attention(first="flash")
    seconds = {Attention(): 3.0, slow: 2.0, wrong: 1.0, raises: 0.5}
    monkeypatch.setattr(attention, "candidates", lambda _: list(seconds))

    def call():
        backend = backends_of(model)[0]
        if backend == AttentionBackendName(raises.backend):
            raise RuntimeError("takes no mask")
        factor = 1.01 if is_wrong and backend == AttentionBackendName(wrong.backend) else 1.0
        with Attention().on(model):
            return factor * passes_one_by_one(model, (), shared, cond, None)["cond"]

    timed = iter([3.0, 2.0] if is_wrong else [3.0, 2.0, 1.0])
    monkeypatch.setattr(timing, "interleaved", lambda functions, *_, **__: {"": [next(timed)]})
    assert attention.fastest(model, call, GPU) == (slow if is_wrong else wrong)
    assert next(timed, None) is None


def test_a_cpu_has_no_choice():
    assert attention.fastest(tiny_transformer(), lambda: pytest.fail("called"), torch.device("cpu")) == Attention()
