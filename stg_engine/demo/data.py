"""Training data of the shipped model: captioned clips of flat shapes that move over a background.

A clip is a pure function of its `ClipSpec`. Pixels are linear mixes of palette colours (edges are antialiased by
coverage), so a reader can undo the mix; see `reader.py`.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

FRAMES, HEIGHT, WIDTH = 17, 64, 64

SHAPES = ("circle", "square", "triangle")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.10),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.95, 0.90, 0.10),
    "purple": (0.75, 0.10, 0.85),
    "cyan": (0.10, 0.85, 0.90),
}
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
#: Gray levels of the two kinds of square in each background; equal levels make it plain.
BACKGROUNDS: dict[str, tuple[float, float]] = {
    "black": (0.03, 0.03),
    "gray": (0.50, 0.50),
    "white": (0.97, 0.97),
    "checkered": (0.30, 0.70),
}
CHECK_SIZE = 8
WORDS = ("a", "and", "moving", "on", "background", *SHAPES, *COLORS, *DIRECTIONS, *BACKGROUNDS)

TWO_SHAPE_SHARE = 0.15
_RADIUS = (9.0, 14.0)
_SPEED = (1.0, 1.75)
_MARGIN = 1.0
#: Distance from the centre to the flat sides, as a multiple of the radius; keeps the three areas alike.
_SQUARE_HALF_SIDE = 0.9
_TRIANGLE_INRADIUS = 0.65


@dataclass(frozen=True)
class Mover:
    """One moving shape. `x`, `y` is the centre in the first frame and `radius` its size, in pixels; `speed` is in
    pixels per frame."""

    shape: str
    color: str
    direction: str
    x: float = 32.0
    y: float = 32.0
    radius: float = 10.0
    speed: float = 1.5


@dataclass(frozen=True)
class ClipSpec:
    """A clip: one or more shapes (later ones in front) over a background."""

    movers: tuple[Mover, ...]
    background: str

    @property
    def caption(self) -> str:
        """For instance "a red circle moving right on a gray background"."""
        parts = [f"a {m.color} {m.shape} moving {m.direction}" for m in self.movers]
        return f"{' and '.join(parts)} on a {self.background} background"


def clip(spec: ClipSpec, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Render `spec` to float32 [3, F, H, W] in [-1, 1]."""
    rows = torch.arange(height, dtype=torch.float32)[:, None] + 0.5
    columns = torch.arange(width, dtype=torch.float32)[None, :] + 0.5
    time = torch.arange(frames, dtype=torch.float32)[:, None, None]

    odd = (rows // CHECK_SIZE + columns // CHECK_SIZE) % 2
    even_level, odd_level = BACKGROUNDS[spec.background]
    picture = (even_level + (odd_level - even_level) * odd).expand(3, frames, height, width)
    for mover in spec.movers:
        step_x, step_y = DIRECTIONS[mover.direction]
        dx = columns - (mover.x + step_x * mover.speed * time)
        dy = rows - (mover.y + step_y * mover.speed * time)
        color = torch.tensor(COLORS[mover.color])[:, None, None, None]
        picture = torch.lerp(picture, color, coverage(mover.shape, dx, dy, mover.radius))
    return picture * 2 - 1


def coverage(shape: str, dx: Tensor, dy: Tensor, radius: float | Tensor) -> Tensor:
    """The part of each pixel, in [0, 1], that a shape covers; `dx`, `dy` are pixel centres relative to its centre."""
    if shape == "circle":
        distance = torch.sqrt(dx * dx + dy * dy) - radius
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - _SQUARE_HALF_SIDE * radius
    else:
        side = dx.abs() * (3**0.5 / 2) - dy / 2
        distance = torch.maximum(side, dy) - _TRIANGLE_INRADIUS * radius
    return (0.5 - distance).clamp(0, 1)


def extent(shape: str, radius: float) -> tuple[float, float, float]:
    """How far a shape reaches from its centre: to either side, up, and down, in pixels."""
    if shape == "circle":
        return radius, radius, radius
    if shape == "square":
        half = _SQUARE_HALF_SIDE * radius
        return half, half, half
    inradius = _TRIANGLE_INRADIUS * radius
    return inradius * 3**0.5, 2 * inradius, inradius


def combinations() -> list[tuple[str, str, str, str]]:
    """All (shape, color, direction, background) of single-shape captions, in a fixed order."""
    return list(product(SHAPES, COLORS, DIRECTIONS, BACKGROUNDS))


def random_mover(rng: random.Random, shape: str, color: str, direction: str) -> Mover:
    """A mover of random size, speed and start that stays inside the picture for all frames."""
    radius, speed = rng.uniform(*_RADIUS), rng.uniform(*_SPEED)
    side, up, down = extent(shape, radius)
    step_x, step_y = DIRECTIONS[direction]
    travel = speed * (FRAMES - 1)
    x = rng.uniform(side + _MARGIN + travel * (step_x < 0), WIDTH - side - _MARGIN - travel * (step_x > 0))
    y = rng.uniform(up + _MARGIN + travel * (step_y < 0), HEIGHT - down - _MARGIN - travel * (step_y > 0))
    return Mover(shape, color, direction, x, y, radius, speed)


def random_spec(rng: random.Random, two_shapes: bool | None = None) -> ClipSpec:
    """A spec with all choices uniform. None draws the number of shapes, too.

    Two shapes have different colours and may cross, but are apart in half of the frames: else a clip need not show
    what its caption says."""
    if two_shapes is None:
        two_shapes = rng.random() < TWO_SHAPE_SHARE
    background = rng.choice(tuple(BACKGROUNDS))
    colors = rng.sample(tuple(COLORS), 2 if two_shapes else 1)
    kinds = [(rng.choice(SHAPES), color, rng.choice(tuple(DIRECTIONS))) for color in colors]
    while True:
        movers = tuple(random_mover(rng, *kind) for kind in kinds)
        if len(movers) == 1 or _frames_apart(*movers) >= FRAMES / 2:
            return ClipSpec(movers, background)


def _frames_apart(first: Mover, second: Mover) -> int:
    """The number of frames in which the circles around the two shapes do not touch."""

    def center(mover: Mover, frame: int) -> tuple[float, float]:
        step_x, step_y = DIRECTIONS[mover.direction]
        return mover.x + step_x * mover.speed * frame, mover.y + step_y * mover.speed * frame

    reach = first.radius + second.radius
    return sum(math.dist(center(first, frame), center(second, frame)) > reach for frame in range(FRAMES))


def random_specs(seed: int, two_shapes: bool | None = None) -> Iterator[ClipSpec]:
    """An endless stream of specs that depends on `seed` alone."""
    rng = random.Random(seed)
    while True:
        yield random_spec(rng, two_shapes)


def clips(specs: Sequence[ClipSpec]) -> Tensor:
    """Render several specs: float32 [B, 3, F, H, W] in [-1, 1]."""
    return torch.stack([clip(spec) for spec in specs])
