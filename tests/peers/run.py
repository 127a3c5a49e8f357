"""diffusers' own pipeline and model tests, plain and with the engine on: what passes plain must pass with it.

    python tests/peers/run.py <checkout of diffusers> [--scale 0] [pytest arguments]

The checkout should have the version of the installed diffusers, which is what is tested. Exit status 1 on a regression.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIPELINES = {
    "ltx": ("test_ltx.py", "test_ltx_image2video.py", "test_ltx_condition.py"),
    "ltx2": ("test_ltx2.py", "test_ltx2_image2video.py", "test_ltx2_condition.py"),
    "mochi": ("test_mochi.py",),
    "cogvideo": ("test_cogvideox.py", "test_cogvideox_image2video.py", "test_cogvideox_video2video.py"),
    "wan": ("test_wan.py", "test_wan_22.py", "test_wan_image_to_video.py", "test_wan_video_to_video.py"),
}


MODELS = [
    f"tests/models/transformers/test_models_transformer_{name}.py"
    for name in ("ltx", "ltx2", "mochi", "cogvideox", "wan")
]
FILES = {
    "pipelines": [f"tests/pipelines/{folder}/{name}" for folder, names in PIPELINES.items() for name in names],
    "models": MODELS,
}


def run(checkout, arguments, on, scale=""):
    """Outcome by test name, and how many pipelines or models had the engine."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "outcomes.json")
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
            "HF_HUB_OFFLINE": "1",
            "STG_PEERS_SCALE": scale,
            "STG_PEERS_ON": on,
            "STG_PEERS_OUT": str(out),
        }
        options = ["-m", "pytest", "-q", "--tb=short", "--disable-warnings", "-p", "plugin", "-p", "no:cacheprovider"]
        subprocess.run(
            [sys.executable, *options, *FILES[on], *arguments], cwd=checkout, env=env, stdin=subprocess.DEVNULL
        )
        if not out.is_file():
            sys.exit("pytest did not start: its message is above")
        result = json.loads(out.read_text())
        return result["outcomes"], result["attached"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--on", choices=FILES, default="pipelines")
    parser.add_argument("--scale", default="0", help="0 must equal plain diffusers; 1 puts skip rows to the same tests")
    options, arguments = parser.parse_known_args()

    source = options.checkout / "src/diffusers/__init__.py"
    theirs = re.search(r'__version__ = "(.+)"', source.read_text())[1]
    print(f"tests of diffusers {theirs}, run on diffusers {version('diffusers')}")

    plain, _ = run(options.checkout, arguments, options.on)
    engine, attached = run(options.checkout, arguments, options.on, options.scale)

    print(f"\n{'plain':8} {'engine':8} test (those that passed or were skipped in both runs are left out)")
    for name in sorted(plain.keys() | engine.keys()):
        before, after = plain.get(name, "-"), engine.get(name, "-")
        if not before == after == "passed" and not before == after == "skipped":
            print(f"{before:8} {after:8} {name.split('/')[-1]}{'   <- regression' if before == 'passed' else ''}")
    passed = [name for name, outcome in plain.items() if outcome == "passed"]
    lost = [name for name in passed if engine.get(name) != "passed"]
    print(f"\n{len(passed)} pass plain, {len(passed) - len(lost)} of them with the engine on {attached} {options.on}")
    if not passed or not attached:
        sys.exit("nothing was compared")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
