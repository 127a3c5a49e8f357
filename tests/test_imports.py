"""What an import costs and loads, each time in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("triton", "diffusers", "transformers", "accelerate", "av")


def _python(code, cwd=ROOT):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# Watches what is asked for rather than what got loaded: a package may be absent, or its import be caught.
WATCH = f"""
import sys
asked = set()
class Watch:
    def find_spec(self, name, path=None, target=None):
        asked.add(name.split(".")[0])
sys.meta_path.insert(0, Watch())
import {{module}}
print(*sorted(asked & {{{{*{HEAVY!r}, "torch"}}}}))
"""


@pytest.mark.parametrize("module", ["stg_engine", "stg_engine.config", "stg_engine.plan", "stg_engine.cli"])
def test_cold_import_is_light(module):
    assert not set(_python(WATCH.format(module=module))) & set(HEAVY)
