"""Write a generated clip: an mp4, a contact-sheet PNG and a metadata JSON, all of them or none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# A 64-pixel clip is unwatchable in a player, and players blur what they enlarge themselves.
MIN_SIDE = 256
SHEET_FRAMES = 9
SHEET_SIDE = 128
_FONT_SIZE = 15
_MARGIN = 8


def output_paths(out: str | os.PathLike) -> list[Path]:
    """`clip.mp4` -> `[clip.mp4, clip.png, clip.json]`. ValueError for another suffix."""
    path = Path(out)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"out={str(out)!r}: must be a file name that ends in .mp4")
    return [path, path.with_suffix(".png"), path.with_suffix(".json")]


def check_writable(paths: Sequence[Path], force: bool) -> None:
    """ValueError if a folder is missing or closed, or if a path is taken (with `force`: taken by a folder)."""
    for path in paths:
        if not path.parent.is_dir():
            raise ValueError(f"out: the folder {str(path.parent)!r} does not exist")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"out: the folder {str(path.parent)!r} is not writable")
        if path.is_dir():
            raise ValueError(f"out: {str(path)!r} is a folder")
        if not force and os.path.lexists(path):
            raise ValueError(f"out: {str(path)!r} exists; choose another name or pass --force to overwrite it")


@contextmanager
def all_or_nothing(paths: Sequence[Path], force: bool = False) -> Iterator[list[Path]]:
    """Yield a temporary path beside each of `paths`; on success rename them all, on any exception leave no trace.

    Files that `force` replaces come back if a rename fails. Raises what `check_writable` raises, also for a file
    that appeared while the block ran.
    """
    check_writable(paths, force)
    parts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    backups = [path.with_name(f".{path.name}.{os.getpid()}.old") for path in paths]
    done: list[Path] = []
    try:
        yield parts
        check_writable(paths, force)
        for path, part, backup in zip(paths, parts, backups, strict=True):
            if os.path.lexists(path):
                os.replace(path, backup)
            done.append(path)
            os.replace(part, path)
    except BaseException:
        for path, part, backup in zip(paths, parts, backups, strict=True):
            if path in done:
                path.unlink(missing_ok=True)
            if os.path.lexists(backup):
                os.replace(backup, path)
            part.unlink(missing_ok=True)
        raise
    for backup in backups:
        with suppress(OSError):  # the new files are in place: a leftover backup must not turn success into failure
            backup.unlink(missing_ok=True)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """[F, H, W, 3] floats in [0, 1] -> uint8, rounded to nearest. ValueError for another shape.

    FloatingPointError for NaN or infinity: encoded they would be a black clip that looks like a result.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames: expected the shape [F, H, W, 3], got {list(frames.shape)}")
    bad = np.flatnonzero(~np.isfinite(frames).all(axis=(1, 2, 3)))
    if bad.size:
        raise FloatingPointError(
            f"the model produced NaN or infinity in {bad.size} of {len(frames)} frames (first: frame {bad[0]}); "
            "nothing was written. Try another --dtype, or lower guidance scales"
        )
    return (np.clip(frames, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def upscale_factor(height: int, width: int, min_side: int = MIN_SIDE) -> int:
    """Smallest integer that lifts the shorter side to at least `min_side` pixels."""
    return max(1, -(-min_side // min(height, width)))


@dataclass(frozen=True)
class Audio:
    """Floats [channels, samples] in [-1, 1], mono or stereo, and samples per second. FloatingPointError for NaN."""

    samples: np.ndarray
    rate: int

    def __post_init__(self) -> None:
        if not np.isfinite(self.samples).all():
            raise FloatingPointError("the model produced NaN or infinity in the audio; nothing was written")


def write_mp4(path: Path, frames: np.ndarray, fps: float, audio: Audio | None = None) -> tuple[int, int]:
    """Encode uint8 [F, H, W, 3] as H.264, yuv420p, enlarged by `upscale_factor` (nearest), and `audio` as AAC.

    Returns (height, width).
    """
    import av

    factor = upscale_factor(*frames.shape[1:3])
    height, width = (side * factor for side in frames.shape[1:3])
    if height % 2 or width % 2:
        raise ValueError(f"frames: H.264 needs an even height and width, got {height}x{width}")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "12", "preset": "medium"}
        layout = "" if audio is None else {1: "mono", 2: "stereo"}[len(audio.samples)]
        sound = None if audio is None else container.add_stream("aac", rate=audio.rate, layout=layout)
        for frame in frames:
            image = np.ascontiguousarray(frame.repeat(factor, axis=0).repeat(factor, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
        if audio is not None and sound is not None:
            samples = np.ascontiguousarray(audio.samples.clip(-1, 1), dtype=np.float32)
            block = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            block.sample_rate = audio.rate
            container.mux([*sound.encode(block), *sound.encode()])
    return height, width


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]], title: str = "") -> Image.Image:
    """Picture with one labelled row of frames per (label, uint8 [F, H, W, 3]); all clips of one shape.

    At most SHEET_FRAMES frames, evenly spaced and including the first and the last; their numbers stand on top.
    Small frames are enlarged by an integer (nearest), large ones reduced to SHEET_SIDE pixels on the shorter side.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, height, width = rows[0][1].shape[:3]
    if any(clip.shape != rows[0][1].shape for _, clip in rows):
        raise ValueError(f"rows: clips of different shapes, {[list(clip.shape) for _, clip in rows]}")
    picked = np.unique(np.linspace(0, count - 1, min(count, SHEET_FRAMES)).round().astype(int))
    short = min(height, width)
    scale = upscale_factor(height, width, SHEET_SIDE) if short < SHEET_SIDE else SHEET_SIDE / short
    cell_w, cell_h = round(width * scale), round(height * scale)
    filter_ = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS

    font = ImageFont.load_default(size=_FONT_SIZE)
    line = _FONT_SIZE + 5
    labels = [label.split("\n") for label, _ in rows]
    label_w = max((round(font.getlength(text)) for lines in labels for text in lines if text), default=0)
    left = _MARGIN + (label_w + _MARGIN if label_w else 0)
    title_lines = _wrap(title, font, len(picked) * (cell_w + 2) + left - _MARGIN)
    top = _MARGIN + line * (len(title_lines) + 1)
    row_h = max(cell_h, line * max(map(len, labels))) + 2
    size = (left + len(picked) * (cell_w + 2) - 2 + _MARGIN, top + len(rows) * row_h - 2 + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(title_lines):
        draw.text((_MARGIN, _MARGIN + i * line), text, fill="black", font=font)
    for column, frame in enumerate(picked):
        draw.text((left + column * (cell_w + 2), top - line), str(frame), fill="#555555", font=font)
    for r, (lines, (_, clip)) in enumerate(zip(labels, rows, strict=True)):
        y = top + r * row_h
        for i, text in enumerate(lines):
            draw.text((_MARGIN, y + i * line), text, fill="black", font=font)
        for column, frame in enumerate(picked):
            image = Image.fromarray(clip[frame]).resize((cell_w, cell_h), filter_)
            sheet.paste(image, (left + column * (cell_w + 2), y))
    return sheet


def write_json(path: Path, data: dict[str, Any]) -> None:
    """UTF-8 JSON with an end-of-line. ValueError for NaN or infinity, which JSON lacks."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _wrap(text: str, font: Any, width: float) -> list[str]:
    """Break `text` between words so that every line fits `width` pixels; a longer word gets a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
