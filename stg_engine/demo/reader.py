"""Reads what a clip shows from its pixels alone: shapes, colours, directions, background, and how clean they are.

All backgrounds are gray, so a pixel's chroma (largest minus smallest channel) is its coverage times the chroma of the
palette colour, and its hue tells which colour. No learned parts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stg_engine.demo.data import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, ClipSpec, coverage

_GRID = torch.arange(-200, 200) + 0.5
#: Area of each shape of radius 1.
_UNIT_AREA = {shape: coverage(shape, _GRID, _GRID[:, None], 100.0).sum() / 100.0**2 for shape in SHAPES}
_CHROMA_FLOOR = 0.15
_MIN_AREA = 20.0
_CHECKERED_STD = 0.10


@dataclass(frozen=True)
class SeenMover:
    """A shape found in a clip. `area` is in pixels; `iou` (overlap with the ideal shape of the same centre and area,
    0..1) and `edge` (mean coverage step across the outline, per pixel) are means over the frames that show it."""

    shape: str
    color: str
    direction: str
    area: float
    iou: float
    edge: float


@dataclass(frozen=True)
class Reading:
    """What a clip shows; `movers` by decreasing area. `stray` is coloured area outside them, in pixels per frame."""

    movers: tuple[SeenMover, ...]
    background: str
    stray: float

    def matches(self, spec: ClipSpec) -> dict[str, bool]:
        """Which parts of the caption hold: shape, color, direction, background and all of them.

        Every captioned mover must be among the largest as many, under its colour (colours in a caption differ)."""
        seen = {mover.color: mover for mover in self.movers[: len(spec.movers)]}
        pairs = [(mover, seen.get(mover.color)) for mover in spec.movers]
        # a wrong colour should not count as a wrong shape when there is only one candidate
        if len(pairs) == 1 and self.movers:
            pairs = [(spec.movers[0], self.movers[0])]
        parts = {
            name: all(other is not None and getattr(mover, name) == getattr(other, name) for mover, other in pairs)
            for name in ("shape", "color", "direction")
        }
        parts["background"] = self.background == spec.background
        return parts | {"all": all(parts.values())}


def read(clip: Tensor, movers: int = 1) -> Reading:
    """Read float [3, F, H, W] in [-1, 1], looking for at most `movers` shapes of different colours."""
    picture = (clip.float() + 1) / 2
    low, high = picture.amin(0), picture.amax(0)
    chroma = high - low
    hues = (picture - low) / chroma.clamp(min=1e-3)  # [3, F, H, W], free of coverage and background
    palette = torch.tensor(list(COLORS.values()))
    palette_chroma = palette.amax(1) - palette.amin(1)
    palette_hues = (palette - palette.amin(1, keepdim=True)) / palette_chroma[:, None]
    distance = (hues[None] - palette_hues[:, :, None, None, None]).square().sum(1)  # [colors, F, H, W]
    nearest = distance.argmin(0)
    colored = chroma > _CHROMA_FLOOR

    covers = []
    for index, name in enumerate(COLORS):
        mask = (nearest == index) & colored
        cover = torch.where(mask, chroma / palette_chroma[index], 0.0).clamp(0, 1)
        covers.append((cover.sum((1, 2)).median().item(), name, cover))
    covers.sort(key=lambda entry: entry[0], reverse=True)
    found = [_mover(name, cover) for area, name, cover in covers[:movers] if area >= _MIN_AREA]
    stray = sum(cover.sum((1, 2)).mean().item() for _, _, cover in covers[len(found) :])
    return Reading(tuple(found), _background(picture, chroma), stray)


def _mover(color: str, cover: Tensor) -> SeenMover:
    """Describe one shape from its coverage [F, H, W]."""
    areas = cover.sum((1, 2))
    shown = areas > 0.5 * areas.max()
    cover, areas = cover[shown], areas[shown]
    frames = torch.nonzero(shown).flatten().float()
    rows = torch.arange(cover.shape[1], dtype=torch.float32) + 0.5
    columns = torch.arange(cover.shape[2], dtype=torch.float32) + 0.5
    center_x = (cover.sum(1) * columns).sum(1) / areas
    center_y = (cover.sum(2) * rows).sum(1) / areas

    velocity = torch.stack([_slope(frames, center_x), _slope(frames, center_y)])
    direction = max(DIRECTIONS, key=lambda name: torch.dot(velocity, torch.tensor(DIRECTIONS[name]).float()).item())

    full = areas >= areas.quantile(0.75)  # the frames in which another shape hides least of it
    dx = columns - center_x[:, None, None]
    dy = rows[:, None] - center_y[:, None, None]
    overlaps = {name: _overlap(name, cover, dx, dy) for name in SHAPES}
    shape = max(SHAPES, key=lambda name: overlaps[name][full].mean().item())
    iou = overlaps[shape].mean().item()
    step = torch.hypot(
        F.pad(cover[:, :, 1:] - cover[:, :, :-1], (0, 1)), F.pad(cover[:, 1:] - cover[:, :-1], (0, 0, 0, 1))
    )
    edge = (step.square().sum() / step.sum().clamp(min=1e-6)).item()
    return SeenMover(shape, color, direction, areas.median().item(), iou, edge)


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """Least-squares slope of y over x, 0 for a single point."""
    x = x - x.mean()
    return (x * (y - y.mean())).sum() / x.square().sum().clamp(min=1e-6)


def _overlap(shape: str, cover: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Intersection over union, per frame, of `cover` [F, H, W] with the ideal `shape` of its area and centre; [F]."""
    radius = torch.sqrt(cover.sum((1, 2), keepdim=True) / _UNIT_AREA[shape])
    ideal = coverage(shape, dx, dy, radius)
    return torch.minimum(ideal, cover).sum((1, 2)) / torch.maximum(ideal, cover).sum((1, 2))


def _background(picture: Tensor, chroma: Tensor) -> str:
    """The background's name from the gray pixels of [3, F, H, W]."""
    gray = picture.mean(0)[chroma < _CHROMA_FLOOR]
    if gray.numel() < 100:
        return "none"
    if gray.std() > _CHECKERED_STD:
        return "checkered"
    plain = {name: levels[0] for name, levels in BACKGROUNDS.items() if levels[0] == levels[1]}
    middle = gray.median().item()
    return min(plain, key=lambda name: abs(plain[name] - middle))
