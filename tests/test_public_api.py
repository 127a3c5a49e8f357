"""The names people import, and the README's Python, run as it stands on a tiny pipeline."""

import functools
import inspect
import re
from pathlib import Path

import pytest
import torch

import stg_engine

README = Path(__file__).parents[1] / "README.md"


def _snippets():
    """(first line, source) of each ```python block."""
    text = README.read_text() if README.exists() else ""
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield pytest.param(match[1], id=f"line{text.count(chr(10), 0, match.start()) + 2}")


SNIPPETS = list(_snippets())


@pytest.fixture
def namespace(monkeypatch, tmp_path):
    """What a snippet may take as given; published checkpoints, devices and sizes are replaced by tiny ones."""
    from diffusers import DiffusionPipeline, LTXPipeline
    from engine.tiny import tiny_inputs, tiny_pipeline

    def tiny(*args, **kwargs):
        return tiny_pipeline(num_layers=28)  # LTX-Video 2B has 28: its layers and presets fit

    def small(call):
        @functools.wraps(call)
        def wrapped(self, *args, **kwargs):
            size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
            return call(self, *args, **kwargs | size)

        return wrapped

    monkeypatch.setattr(LTXPipeline, "__call__", small(LTXPipeline.__call__))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", tiny)
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *args, **kwargs: self)
    monkeypatch.chdir(tmp_path)
    pipe = tiny()
    shared, cond, uncond = tiny_inputs()
    latents, sizes = shared.pop("hidden_states"), {k: v for k, v in shared.items() if k != "timestep"}
    pipe.scheduler.set_timesteps(2, mu=1.0)
    given = {"pipe": pipe, "transformer": pipe.transformer, "scheduler": pipe.scheduler, "torch": torch}
    given |= {"stg_engine": stg_engine, "latents": latents, "sizes": sizes}
    for prompt, name in ((cond, "prompt"), (uncond, "negative")):
        given |= {name: prompt["encoder_hidden_states"], f"{name}_mask": prompt["encoder_attention_mask"]}
    return given


def test_readme_has_python():
    assert SNIPPETS


@pytest.mark.parametrize("source", SNIPPETS)
def test_readme_snippet_runs(source, namespace):
    exec(compile(source, str(README), "exec"), namespace)


def test_how_to_add_a_family_runs_as_written(monkeypatch):
    from stg_engine.models import base

    monkeypatch.setattr(base, "_SPECS", dict(base._SPECS))  # the page registers a family
    page = (README.parent / "docs/adding_a_family.md").read_text()
    sources = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    namespace = {"__name__": "my_model"}
    for source in sources:
        exec(compile(source, "adding_a_family.md", "exec"), namespace)
    assert len(sources) == 4


@pytest.mark.parametrize("name", stg_engine.__all__)
def test_public_name_is_documented(name):
    value = getattr(stg_engine, name)
    if isinstance(value, str):
        return  # __version__
    doc = inspect.getdoc(value) or ""
    assert doc, f"{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{name} has only the signature that dataclass writes"
