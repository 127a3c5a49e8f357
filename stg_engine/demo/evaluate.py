"""Measure how well generated clips follow their captions: `python -m stg_engine.demo.evaluate [--model FOLDER]`.

Prints one row per guidance setting: the share of clips in which each part of the caption holds, read from the pixels
by `reader.read`, and how clean the shapes are. Clip i has the same caption and the same noise in every setting.
"""

import argparse
import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import LTXPipeline
from torch import Tensor
from tqdm import tqdm

from stg_engine.config import MODES, STGConfig
from stg_engine.demo import SETTING, model_path
from stg_engine.demo.data import ClipSpec, Mover, combinations, random_specs
from stg_engine.demo.reader import read

PARTS = ("shape", "color", "direction", "background", "all")


def captions_of(count: int, seed: int, two_shapes: bool = False) -> list[ClipSpec]:
    """`count` different captions: of one shape, drawn from all combinations; or of two shapes. Positions are unused."""
    if two_shapes:
        return list(islice(random_specs(seed, two_shapes=True), count))
    drawn = random.Random(seed).sample(combinations(), count)
    return [ClipSpec((Mover(shape, color, direction),), background) for shape, color, direction, background in drawn]


def generate(
    pipe: LTXPipeline,
    specs: Sequence[ClipSpec],
    *,
    guidance_scale: float,
    config: STGConfig | None = None,
    steps: int = SETTING.steps,
    seed: int = 0,
    batch: int = 32,
    progress: bool = True,
) -> Tensor:
    """One clip per spec, float32 [N, 3, F, H, W] in [-1, 1]; clip i starts from noise of seed `seed + i`."""
    pipe.set_progress_bar_config(disable=True)
    clips: list[Tensor] = []
    with tqdm(total=len(specs), disable=not progress, dynamic_ncols=True) as bar, _attached(pipe, config):
        for start in range(0, len(specs), batch):
            chosen = specs[start : start + batch]
            frames = pipe(
                [spec.caption for spec in chosen],
                height=SETTING.height,
                width=SETTING.width,
                num_frames=SETTING.frames,
                frame_rate=SETTING.fps,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chosen))],
                output_type="pt",
            ).frames  # [B, F, 3, H, W] in [0, 1]
            clips.append(frames.float().transpose(1, 2) * 2 - 1)
            bar.update(len(chosen))
    return torch.cat(clips)


def _attached(pipe: LTXPipeline, config: STGConfig | None) -> Any:
    """The engine on `pipe` for a with statement; nothing without a config."""
    if config is None:
        return nullcontext()
    import stg_engine  # plain guidance is measured without the engine

    return stg_engine.attach(pipe, config)


@dataclass(frozen=True)
class Score:
    """Means over clips: `parts` are shares of clips in which a part of the caption holds; `iou`, `edge` and `stray` are
    those of `reader`, over the clips that show a shape."""

    clips: int
    parts: dict[str, float]
    iou: float
    edge: float
    stray: float

    def __str__(self) -> str:
        shares = "  ".join(f"{name} {share:6.1%}" for name, share in self.parts.items())
        error = math.sqrt(self.parts["all"] * (1 - self.parts["all"]) / self.clips)
        return f"{shares} ± {error:.1%}  iou {self.iou:.3f}  edge {self.edge:.3f}  stray {self.stray:.2f}"


def score(clips: Tensor, specs: Sequence[ClipSpec]) -> Score:
    """Read clips [N, 3, F, H, W] and compare them with their captions."""
    readings = [read(clip, len(spec.movers)) for clip, spec in zip(clips, specs, strict=True)]
    matches = [reading.matches(spec) for reading, spec in zip(readings, specs, strict=True)]
    movers = [mover for reading in readings for mover in reading.movers]
    return Score(
        clips=len(specs),
        parts={name: sum(match[name] for match in matches) / len(matches) for name in PARTS},
        iou=sum(mover.iou for mover in movers) / max(1, len(movers)),
        edge=sum(mover.edge for mover in movers) / max(1, len(movers)),
        stray=sum(reading.stray for reading in readings) / len(readings),
    )


def contact_sheet(clips: Tensor, path: Path, rows: int = 8, columns: int = 5) -> None:
    """Save a PNG: a row per clip of [N, 3, F, H, W], `columns` frames of it side by side."""
    from PIL import Image

    chosen = torch.linspace(0, clips.shape[2] - 1, columns).round().long()
    picture = torch.cat([torch.cat(list(clip[:, chosen].unbind(1)), dim=2) for clip in clips[:rows]], dim=1)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    image = Image.fromarray(pixels.numpy())
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)


def main() -> None:
    shown = SETTING.config
    parser = argparse.ArgumentParser(prog="python -m stg_engine.demo.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--clips", type=int, default=len(combinations()), help="captions; the default is all")
    parser.add_argument("--two-shapes", action="store_true", help="captions of two shapes, which may cross")
    parser.add_argument("--steps", type=int, default=SETTING.steps)
    parser.add_argument("--guidance-scale", type=float, default=SETTING.guidance_scale)
    parser.add_argument("--stg-scale", type=float, default=0.0)
    parser.add_argument("--stg-layers", type=int, nargs="+", default=list(shown.layers))
    parser.add_argument("--stg-mode", choices=MODES, default=shown.mode)
    parser.add_argument("--rescale", type=float, default=shown.rescale)
    parser.add_argument("--compare", action="store_true", help="three rows: no guidance, CFG, CFG + the STG setting")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sheet", type=Path, help="save some of the last setting's clips as a PNG")
    args = parser.parse_args()

    config = None
    if args.stg_scale > 0 or args.compare:
        layers, scale = tuple(args.stg_layers), args.stg_scale or shown.scale
        config = STGConfig(layers=layers, scale=scale, mode=args.stg_mode, rescale=args.rescale)
    runs = [(args.guidance_scale, config)]
    if args.compare:
        runs = [(1.0, None), (args.guidance_scale, None), *runs]
    pipe = LTXPipeline.from_pretrained(str(args.model), dtype=getattr(torch, args.dtype))
    specs = captions_of(args.clips, args.seed, args.two_shapes)
    kind = "two shapes" if args.two_shapes else "one shape"
    print(f"{len(specs)} captions of {kind}, {args.steps} steps, {args.dtype}")
    for scale, setting in runs:
        options = {"steps": args.steps, "seed": args.seed * 100_000, "batch": args.batch}
        clips = generate(pipe, specs, guidance_scale=scale, config=setting, **options)
        print(f"{label(scale, setting):44} {score(clips, specs)}", flush=True)
        if args.sheet:
            contact_sheet(clips, args.sheet)


def label(guidance_scale: float, config: STGConfig | None) -> str:
    """For instance "CFG 3 + STG 1 residual (8,) rescale 0"."""
    name = f"CFG {guidance_scale:g}" if guidance_scale > 1 else "no guidance"
    if config is None:
        return name
    return f"{name} + STG {config.scale:g} {config.mode} {config.layers} rescale {config.rescale:g}"


if __name__ == "__main__":
    main()
