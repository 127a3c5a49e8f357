"""True shapes of the models that STG was published for, one row per transformer and resolution."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """C = heads * head_size channels; `tokens` of a video at the named resolution, `latent` values per token.

    text    tokens of a prompt, padded: the keys of cross-attention, or with `joint` a part of the sequence of
            self-attention, behind the video or, with `text_first`, before it
    """

    model: str
    tokens: int
    heads: int
    head_size: int
    latent: int
    text: int
    per_head: bool = False
    layer_norm: bool = False
    joint: bool = False
    text_first: bool = False

    @property
    def channels(self) -> int:
        return self.heads * self.head_size

    @property
    def sequence(self) -> int:
        """Tokens in self-attention."""
        return self.tokens + self.text * self.joint


_COG = {"per_head": True, "layer_norm": True, "joint": True, "text_first": True}

SHAPES = (
    Shape("LTX-Video 2B, 768x512x121", 6144, 32, 64, 128, 256),
    Shape("LTX-Video 13B, 1216x704x121", 13376, 32, 128, 128, 256),
    Shape("LTX-2, 768x512x121", 6144, 32, 128, 128, 1024),
    Shape("Mochi, 848x480x85", 23850, 24, 128, 48, 256, per_head=True, joint=True),
    Shape("CogVideoX-2B, 720x480x49", 17550, 30, 64, 64, 226, **_COG),
    Shape("CogVideoX-5B, 720x480x49", 17550, 48, 64, 64, 226, **_COG),
    Shape("HunyuanVideo, 512x320x61", 10240, 24, 128, 64, 256, per_head=True, layer_norm=True, joint=True),
    Shape("Wan 2.1 1.3B, 832x480x81", 32760, 12, 128, 64, 512, layer_norm=True),
    Shape("Wan 2.1 14B, 832x480x81", 32760, 40, 128, 64, 512, layer_norm=True),
)
