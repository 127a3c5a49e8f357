"""The small LTX-Video model that ships with the repo, and the setting it is shown with. Standard library only."""

from dataclasses import dataclass
from pathlib import Path

from stg_engine.config import STGConfig


def model_path() -> Path:
    """The folder of the shipped pipeline, for `LTXPipeline.from_pretrained`."""
    return Path(__file__).parent / "model"


@dataclass(frozen=True)
class DemoSetting:
    """How the shipped model is called: sizes in frames and pixels, `fps` both told to the model and written."""

    prompt: str
    frames: int
    height: int
    width: int
    fps: int
    steps: int
    guidance_scale: float
    config: STGConfig


SETTING = DemoSetting(
    prompt="a red circle moving right on a gray background",
    frames=17,
    height=64,
    width=64,
    fps=8,
    steps=24,
    guidance_scale=3.0,
    config=STGConfig(layers=(6,), scale=1.0, mode="residual", rescale=0.0),
)
