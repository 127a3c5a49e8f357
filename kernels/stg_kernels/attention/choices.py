"""What was measured, in memory and in a file.

An entry counts only with the versions of everything that it may depend on.
"""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from stg_kernels.attention.parts import Part

VERSION = 1
"""Of the Triton kernel and of the file; raised when either changes."""

PACKAGES = ("triton", "xformers", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl")


FIELDS = {"kind": dict, "versions": dict, "backend": str, "seconds": dict, "refused": dict}
"""Of an entry."""


FILE_VARIABLES = ("STG_ATTENTION_CACHE", "XDG_CACHE_HOME")


class Kind(NamedTuple):
    """Parts that share a choice. Row counts and exact lengths are not in it; tokens count in powers of 2."""

    device: str
    dtype: str
    heads: int
    head_size: int
    queries: int
    keys: int
    features: str

    def __str__(self) -> str:
        tokens = f"up to {self.queries} x {self.keys} tokens"
        return f"{tokens}, {self.heads} heads of {self.head_size}, {self.dtype}, {self.features}"


def kind_of(part: Part) -> Kind:
    """A part's kind."""
    _, queries, heads, head_size = part.q.shape
    up_to = [1 << (size - 1).bit_length() for size in (queries, part.k.shape[1])]
    dtype = str(part.q.dtype).removeprefix("torch.")
    return Kind(_device(part.q.device), dtype, heads, head_size, up_to[0], up_to[1], part.features)


@dataclass(frozen=True)
class Choice:
    """Of a kind: its fastest exact backend; median seconds of each that ran, and why others did not."""

    backend: str
    seconds: dict[str, float]
    refused: dict[str, str]


class Choices:
    """A dictionary that outlives the process; what is in the file is read once.

    changes  how often a choice was made or all were dropped
    """

    def __init__(self) -> None:
        self.changes = 0
        self._known: dict[Kind, Choice] = {}
        self._read: tuple[str | None, ...] | None = None

    def get(self, kind: Kind) -> Choice | None:
        self._load()
        return self._known.get(kind)

    def all(self) -> dict[Kind, Choice]:
        self._load()
        return dict(self._known)

    def put(self, kind: Kind, choice: Choice) -> None:
        """Into memory and the file, beside what other processes, devices and versions have there."""
        self._known[kind] = choice
        self.changes += 1
        path, new = file(), {"kind": kind._asdict(), "versions": _versions(), **asdict(choice)}
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock", timeout=10):
                others = [old for old in _entries(path) if any(old[key] != new[key] for key in ("kind", "versions"))]
                temporary.write_text(json.dumps([*others, new], indent=1))
                temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            warnings.warn(f"{path} cannot be written ({error}); attention will be measured again", stacklevel=2)

    def forget(self) -> None:
        """All but the file."""
        self._known.clear()
        self._read = None
        self.changes += 1

    def _load(self) -> None:
        source = tuple(map(os.environ.get, FILE_VARIABLES))
        if self._read == source:
            return
        self._read = source
        self._known.clear()
        for entry in _entries(file()):
            if entry["versions"] == _versions():
                choice = Choice(entry["backend"], entry["seconds"], entry["refused"])
                self._known.setdefault(Kind(**entry["kind"]), choice)


def file() -> Path:
    """`$STG_ATTENTION_CACHE`, else stg_engine/attention.json in the user's cache folder."""
    path, folder = map(os.environ.get, FILE_VARIABLES)
    return Path(path).expanduser() if path else Path(folder or Path.home() / ".cache") / "stg_engine" / "attention.json"


def _entries(path: Path) -> list[dict[str, Any]]:
    """The file's entries that are understood, with a warning if that is not all of it."""
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be read ({error}); attention is chosen without it", stacklevel=2)
        return []
    understood = [entry for entry in entries if _is_entry(entry)] if isinstance(entries, list) else []
    if not isinstance(entries, list) or len(understood) < len(entries):
        warnings.warn(f"{path} holds more than attention choices, which is left out", stacklevel=2)
    return understood


def _is_entry(entry: Any) -> bool:
    try:
        hash(Kind(**entry["kind"]))
        return all(isinstance(entry[name], kind) for name, kind in FIELDS.items())
    except (TypeError, KeyError):
        return False


@cache
def _versions() -> dict[str, str]:
    found = {"stg_kernels.attention": str(VERSION), "torch": torch.__version__}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
