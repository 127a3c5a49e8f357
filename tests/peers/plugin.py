"""Pytest plugin for diffusers' own tests: offline, outcomes to a file, and with STG_PEERS_SCALE the engine on.

Loaded with `-p`, so the installed diffusers is imported before the checkout's conftest puts its own src/ first.
"""

import functools
import json
import os
import string
import weakref

import diffusers
import offline
import transformers

TINY_T5 = "hf-internal-testing/tiny-random-t5"

outcomes: dict[str, str] = {}
attached = 0
engines = weakref.WeakKeyDictionary()  # transformer -> the engine on it


def pytest_configure(config):
    offline.block_network()
    serve_locally(transformers.AutoConfig, tiny_t5_config)
    serve_locally(transformers.AutoTokenizer, tiny_t5_tokenizer)
    if scale := os.environ.get("STG_PEERS_SCALE"):
        from stg_engine.calls import PIPELINES
        from stg_engine.models import supported

        on, names = {
            "pipelines": (attach_on_init, list(PIPELINES)),
            "models": (hook_on_init, [spec.transformer for spec in supported()]),
        }[os.environ["STG_PEERS_ON"]]
        for name in names:
            on(getattr(diffusers, name), float(scale))


def tiny_t5_config():
    return transformers.T5Config(
        vocab_size=1103,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=5,
        num_heads=4,
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def tiny_t5_tokenizer():
    pieces = [*string.ascii_lowercase, *("▁" + letter for letter in string.ascii_lowercase)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((piece, -3.0) for piece in pieces)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def serve_locally(auto, make):
    original = auto.from_pretrained

    def from_pretrained(name, *args, **kwargs):
        return make() if name == TINY_T5 else original(name, *args, **kwargs)

    auto.from_pretrained = from_pretrained


def attach_on_init(pipeline_class, scale):
    """Every pipeline the tests build has the engine; the newest pipeline of a shared transformer holds it."""
    import stg_engine

    init = pipeline_class.__init__

    @functools.wraps(init)  # diffusers reads the signature
    def wrapped(self, *args, **kwargs):
        global attached
        init(self, *args, **kwargs)
        transformer = getattr(self, "transformer", None)
        if transformer is None:
            return
        if transformer in engines:
            engines.pop(transformer).detach()
        engines[transformer] = stg_engine.attach(self, stg_engine.STGConfig(layers=(0,), scale=scale))
        attached += 1

    pipeline_class.__init__ = wrapped


def hook_on_init(model_class, scale):
    """Every model the tests build has a Denoiser's hooks; outside its guided steps the model is as it was."""
    import stg_engine

    init = model_class.__init__

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        global attached
        init(self, *args, **kwargs)
        engines[self] = stg_engine.Denoiser(self, stg_engine.STGConfig(layers=(0,), scale=scale))
        attached += 1

    model_class.__init__ = wrapped


def pytest_runtest_logreport(report):
    if report.outcome != "passed" or report.when == "call":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish():
    with open(os.environ["STG_PEERS_OUT"], "w") as file:
        json.dump({"outcomes": outcomes, "attached": attached}, file)
