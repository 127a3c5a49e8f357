"""The shape of the source tree, read from its syntax: who imports whom, who hooks, how long, what is written where."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file or folder of stg_engine imports only from lines above its own; names on one line do not see each other.
LAYERS = [
    {"schedule", "conventions"},
    {"config", "media", "layout", "joint"},
    {"presets", "plan", "guidance", "memo"},
    {"comfyui"},
    {"hooks"},
    {"guard"},
    {"rows"},
    {"models", "fused"},
    {"once", "runtime"},
    {"inputs", "combine", "oracle"},
    {"denoiser", "reference"},
    {"report", "compare", "calls"},
    {"pipeline", "guider", "export"},
    {"demo", "env"},
    {"settings"},
    {"arguments"},
    {"generate"},
    {"bench"},
    {"cli"},
    {"__main__", "__init__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Exceptions, inside a function only.
LAZY_UP = {("config", "presets")}  # STGConfig.preset("name")

# Inside a folder the files are siblings; these are what they share.
SHARED = {
    "models": {"base"},
    "calls": {"base"},
}

# Inside these folders, too, a file imports only from lines above its own.
INSIDE = {
    "bench": [
        {"case", "record", "timing", "count"},
        {"calls", "cost", "passes", "ladder", "layers"},
        {"cases", "ceilings", "attention", "plots", "gate"},
        {"variants", "sweep"},
        {"run", "table", "sweep_output"},
        {"command"},
    ]
}
INSIDE_RANK = {folder: {n: i for i, names in enumerate(lines) for n in names} for folder, lines in INSIDE.items()}

# Plain data: these may load nothing but the standard library and each other.
STANDARD_LIBRARY_ONLY = {"schedule", "config", "conventions", "presets", "comfyui", "plan"}

# name -> the only modules that may say it
ONLY_IN = {
    "HookRegistry": {"hooks"},
    "register_hook": {"hooks"},
    "remove_hook": {"hooks"},
    "ModelHook": {"hooks"},
    "EngineHook": {"hooks", "once", "guard"},  # to subclass; only denoiser and pipeline install them
    "ArgumentHook": {"hooks", "rows", "pipeline", "guider"},
    "register_forward_hook": {"reference", "bench"},  # the oracle skips a block as the published pipelines do
    "register_forward_pre_hook": {"reference", "bench"},
    "DiffusionPipeline": {"pipeline", "generate", "demo"},
    "triton": {"fused", "bench"},
}

MAX_LINES = {"stg_engine": 350, "kernels": 350, "benchmarks": 350, "tests": 600}

ENGINE = sorted((ROOT / "stg_engine").rglob("*.py"))


def _parts(path):
    return path.relative_to(ROOT / "stg_engine").with_suffix("").parts


def _id(path):
    return "/".join(_parts(path))


def _tree(path):
    return ast.parse(path.read_text(), str(path))


def _nodes(node, functions=True):
    for child in ast.iter_child_nodes(node):
        yield child
        if functions or not isinstance(child, ast.FunctionDef):
            yield from _nodes(child, functions)


def _imports(path, lazy=True):
    """Dotted names of all that a file imports; without `lazy`, of what it imports when it is imported itself."""
    package = ["stg_engine", *_parts(path)[:-1]]
    for node in _nodes(_tree(path), lazy):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _engine_imports(path, lazy=True):
    """What a file imports of stg_engine, as module parts below it: ("models", "base")."""
    for name in _imports(path, lazy):
        first, *rest = name.split(".")
        if first != "stg_engine":
            continue
        while rest and not _is_module(rest):  # `from stg_engine.config import STGConfig`: the module is what counts
            rest = rest[:-1]
        yield tuple(rest)


def _is_module(parts):
    path = ROOT.joinpath("stg_engine", *parts)
    return path.with_suffix(".py").is_file() or path.is_dir()


@pytest.mark.parametrize("path", ENGINE, ids=_id)
def test_imports_point_down(path):
    own = _parts(path)
    assert own[0] in RANK, f"{own[0]} has no line in LAYERS"
    for other in _engine_imports(path):
        if not other:  # `from stg_engine import X`: through the front door only from above everything
            assert RANK[own[0]] > RANK["denoiser"], "import the module, not the package"
        elif other[0] != own[0]:
            lazy = (own[0], other[0]) in LAZY_UP and other not in _engine_imports(path, lazy=False)
            assert lazy or RANK[other[0]] < RANK[own[0]], f"{'.'.join(own)} imports {'.'.join(other)}"
        elif own[-1] != "__init__" and len(other) > 1 and own[0] in SHARED:
            assert other[1] in SHARED[own[0]], f"{'.'.join(own)} imports its sibling {'.'.join(other)}"
        elif own[-1] != "__init__" and len(other) > 1 and own[0] in INSIDE:
            rank = INSIDE_RANK[own[0]]
            assert rank[other[1]] < rank[own[1]], f"{'.'.join(own)} imports its sibling {'.'.join(other)}"


@pytest.mark.parametrize("path", [path for path in ENGINE if _parts(path)[0] in STANDARD_LIBRARY_ONLY], ids=_id)
def test_plain_data_needs_only_the_standard_library(path):
    foreign = {name.split(".")[0] for name in _imports(path)} - sys.stdlib_module_names - {"stg_engine"}
    assert not foreign
    assert {other[0] for other in _engine_imports(path)} <= STANDARD_LIBRARY_ONLY


@pytest.mark.parametrize("path", ENGINE, ids=_id)
def test_each_mechanism_has_one_home(path):
    said = {name for dotted in _imports(path) for name in dotted.split(".")}
    for node in _nodes(_tree(path)):
        if isinstance(node, ast.Name):
            said.add(node.id)
        elif isinstance(node, ast.Attribute):
            said.add(node.attr)
    home = _parts(path)[0]
    assert not [name for name, homes in ONLY_IN.items() if name in said and home not in homes]


def _tracked():
    """Files that are or could be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [path for path in (ROOT / name for name in names if name) if path.is_file()]


def test_files_stay_short():
    long = {}
    for path in _tracked():
        limit = MAX_LINES.get(path.relative_to(ROOT).parts[0])
        lines = len(path.read_text().splitlines()) if path.suffix == ".py" and limit else 0
        if lines > (limit or 0):
            long[path.relative_to(ROOT).as_posix()] = lines
    assert not long


def test_folders_that_must_not_be_packages():
    # In kernels/ it would hide Hugging Face's package `kernels`; in tests/ module names would depend on the root.
    assert not [*ROOT.glob("kernels/__init__.py"), *ROOT.glob("tests/**/__init__.py")]
    named_kernels = {path.parent for path in _tracked() if path.parent.name == "kernels"}
    assert named_kernels <= {ROOT / "kernels"}


def test_no_path_of_one_machine():
    machine = re.compile(r"(?<![\w./~<>-])/(?:" + "|".join(("work", "tmp", "root", "farm", "home")) + r")/")
    found = []
    for path in _tracked():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue  # weights and pictures
        found += [f"{path.relative_to(ROOT)}:{n}: {line}" for n, line in enumerate(lines, 1) if machine.search(line)]
    assert not found
