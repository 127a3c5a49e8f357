"""What an import loads, each time in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "triton", "diffusers", "transformers", "accelerate", "av", "matplotlib")

# Watches what is asked for, not what got loaded: a package may be absent, or its ImportError be caught.
WATCH = """
import importlib, sys

module, *heavy = sys.argv[1:]
asked = set()

class Watch:
    def find_spec(self, name, path=None, target=None):
        asked.add(name.split(".")[0])

sys.meta_path.insert(0, Watch())
importlib.import_module(module)
print(*sorted(asked.intersection(heavy)))
"""


@pytest.mark.parametrize("module", ["stg_engine", "stg_engine.plan", "stg_engine.models", "stg_engine.cli"])
def test_cold_import_is_light(module):
    command = [sys.executable, "-c", WATCH, module, *HEAVY]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
