"""The models that are measured: published transformers with random weights, and versions of them for a CPU.

A transformer is its diffusers class with the published config, which mostly is the class's defaults. Weights are normal
with variance 1 / fan-in, norms around one, so that gates, tables and norms that begin as zeros or ones count as well
and activations stay near one through all blocks. What loading keeps in float32 (`_keep_in_fp32_modules`) is float32.

A "cpu" version has the published model's head size, its ratio of feed-forward to width, its streams, and the skipped
layer at its depth, at 256 channels: a step's plain passes are 12 to 14 GFLOP in float32, 114 GFLOP for all nine, more
than 99 % of it in the blocks. Its prompt has at least 8 tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stg_engine.bench import calls
from stg_engine.bench.calls import SEED, Video
from stg_engine.bench.case import KINDS, Case, Inputs
from stg_engine.config import STGConfig


@dataclass(frozen=True, kw_only=True)
class Model:
    """A published transformer, and how it is measured.

    transformer, changes   diffusers class, and what of its defaults is another
    call            makes the inputs as the family's pipeline does
    token           width, height and frames of a video's token; its first frame stands alone
    text            tokens of a padded prompt
    config          the published setting, in the model's own space and float32: a single step knows no sigma
    guidance_scale  g, or None: guidance-distilled
    videos, small   published sizes, the first one being the case that has the model's name; one of at most 512 tokens
    cpu_changes, cpu_video, cpu_text, cpu_layers   the version for a CPU
    """

    name: str
    title: str
    transformer: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    call: calls.Call
    token: tuple[int, int, int]
    text: int
    config: STGConfig
    guidance_scale: float | None
    videos: tuple[Video, ...]
    small: Video
    cpu_changes: Mapping[str, Any]
    cpu_video: Video
    cpu_text: int = 8
    cpu_layers: tuple[int, ...]

    def cases(self) -> list[Case]:
        first, *others = self.videos
        cpu = {**self.changes, **self.cpu_changes}
        blocks = cpu["num_layers"] + cpu.get("num_single_layers", 0)
        small_title = f"{self.title} ({blocks} blocks, 256 channels)"
        return [
            self._case(self.name, self.title, "true", first),
            *(self._case(f"{self.name}-{v.width}x{v.height}", self.title, "true", v) for v in others),
            self._case(f"{self.name}-small", self.title, "small", self.small),
            replace(
                self._case(f"{self.name}-cpu", small_title, "cpu", self.cpu_video, cpu, self.cpu_text),
                config=replace(self.config, layers=self.cpu_layers),
            ),
        ]

    def _case(
        self,
        name: str,
        title: str,
        kind: str,
        video: Video,
        changes: Mapping[str, Any] | None = None,
        text: int | None = None,
    ) -> Case:
        changes, text = changes or self.changes, text or self.text
        width, height, frames = self.token
        return Case(
            name=name,
            title=f"{title}, {video}",
            kind=kind,
            tokens=((video.frames - 1) // frames + 1) * (video.height // height) * (video.width // width),
            config=self.config,
            guidance_scale=self.guidance_scale,
            build=partial(_build, self.transformer, changes),
            inputs=partial(self._inputs, changes, video, text),
        )

    def _inputs(
        self, changes: Mapping[str, Any], video: Video, text: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Inputs, Inputs, Inputs | None]:
        config = {**_defaults(self.transformer), **changes}
        shared, cond, uncond = self.call(config, video, text, calls.Draw(device, dtype))
        return shared, cond, None if self.guidance_scale is None else uncond


def _defaults(transformer: str) -> dict[str, Any]:
    import diffusers

    parameters = inspect.signature(getattr(diffusers, transformer).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _build(transformer: str, changes: Mapping[str, Any]) -> nn.Module:
    """On the caller's `torch.device` in the caller's default dtype; on "meta" without values."""
    import diffusers
    from diffusers.models.modeling_utils import no_init_weights

    kind = getattr(diffusers, transformer)
    with no_init_weights():
        model = kind(**changes)
    kept = set(kind._keep_in_fp32_modules or ())
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        if not kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if not parameter.is_meta:
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(SEED))
            _fill(name, parameter.data, generator)
    return model.eval().requires_grad_(False)


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.ndim > 1:
        parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    else:  # biases, and the weights of norms
        parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1, generator=generator)


_LTX: dict[str, Any] = {
    "transformer": "LTXVideoTransformer3DModel",
    "call": calls.ltx,
    "token": (32, 32, 8),
    "text": 256,
}
_COGVIDEOX: dict[str, Any] = {
    "transformer": "CogVideoXTransformer3DModel",
    "call": calls.cogvideox,
    "token": (16, 16, 4),
    "text": 226,
    "guidance_scale": 6.0,
    "videos": (Video(720, 480, 49),),
    "small": Video(256, 256, 5),
}
_WAN: dict[str, Any] = {
    "transformer": "WanTransformer3DModel",
    "call": calls.wan,
    "token": (16, 16, 4),
    "text": 512,
    "guidance_scale": 5.0,
    "videos": (Video(832, 480, 81),),
    "small": Video(256, 256, 5),
}


def _heads(count: int, size: int, **further: Any) -> dict[str, Any]:
    return {"num_attention_heads": count, "attention_head_dim": size, **further}


_CPU_CHANNELS = {"in_channels": 16, "out_channels": 16}  # LTX: 128 for 2048 and more

MODELS = (
    Model(
        name="ltx-video-2b",
        title="LTX-Video 2B",
        **_LTX,
        config=STGConfig.preset("ltx-video-2b"),
        guidance_scale=3.0,
        videos=(Video(768, 512, 121), Video(1216, 704, 121)),
        small=Video(256, 256, 9),
        cpu_changes=_heads(4, 64, cross_attention_dim=256, num_layers=14, caption_channels=512, **_CPU_CHANNELS),
        cpu_video=Video(256, 160, 25),
        cpu_layers=(9,),
    ),
    Model(
        name="ltx-video-13b",
        title="LTX-Video 13B",
        **_LTX,
        changes=_heads(32, 128, cross_attention_dim=4096, num_layers=48),
        # The schedule's entry at sigma 0.985.
        config=STGConfig.preset("ltx-video", layers=(28,), scale=4.0, rescale=0.5, arithmetic="float32"),
        guidance_scale=8.0,
        videos=(Video(1216, 704, 121),),
        small=Video(256, 256, 9),
        cpu_changes=_heads(2, 128, cross_attention_dim=256, num_layers=12, caption_channels=256, **_CPU_CHANNELS),
        cpu_video=Video(256, 192, 25),
        cpu_layers=(7,),
    ),
    Model(
        name="ltx-2",
        title="LTX-2",
        transformer="LTX2VideoTransformer3DModel",
        call=calls.ltx_2,
        token=(32, 32, 8),
        text=1024,
        config=STGConfig.preset("ltx-2.0", space="model"),
        guidance_scale=3.0,
        videos=(Video(768, 512, 121),),
        small=Video(256, 256, 9),
        cpu_changes=_heads(
            2,
            128,
            cross_attention_dim=256,
            audio_num_attention_heads=2,
            audio_attention_head_dim=64,
            audio_cross_attention_dim=128,
            num_layers=10,
            caption_channels=240,
            **_CPU_CHANNELS,
            **{f"audio_{name}": channels for name, channels in _CPU_CHANNELS.items()},
        ),
        cpu_video=Video(256, 128, 25),
        cpu_text=24,
        cpu_layers=(6,),
    ),
    Model(
        name="mochi",
        title="Mochi",
        transformer="MochiTransformer3DModel",
        call=calls.mochi,
        token=(16, 16, 6),
        text=256,
        config=STGConfig.preset("mochi"),
        guidance_scale=4.5,
        videos=(Video(848, 480, 85),),
        small=Video(256, 256, 7),
        cpu_changes=_heads(2, 128, num_layers=12, pooled_projection_dim=128, text_embed_dim=320),
        cpu_video=Video(96, 96, 31),
        cpu_layers=(8,),
    ),
    Model(
        name="cogvideox-2b",
        title="CogVideoX-2B",
        **_COGVIDEOX,
        config=STGConfig.preset("cogvideox-2b"),
        cpu_changes={
            **_heads(4, 64, num_layers=10, time_embed_dim=64, text_embed_dim=512, max_text_seq_length=8),
            "sample_width": 12,
            "sample_height": 12,
            "sample_frames": 25,
        },
        cpu_video=Video(96, 96, 25),
        cpu_layers=(3,),
    ),
    Model(
        name="cogvideox-5b",
        title="CogVideoX-5B",
        **_COGVIDEOX,
        changes=_heads(48, 64, num_layers=42, use_rotary_positional_embeddings=True),
        config=STGConfig.preset("cogvideox-5b"),
        cpu_changes={
            **_heads(4, 64, num_layers=14, time_embed_dim=64, text_embed_dim=352, max_text_seq_length=8),
            "sample_width": 12,
            "sample_height": 12,
            "sample_frames": 17,
        },
        cpu_video=Video(96, 96, 17),
        cpu_layers=(3,),
    ),
    Model(
        name="hunyuan-video",
        title="HunyuanVideo",
        transformer="HunyuanVideoTransformer3DModel",
        call=calls.hunyuan_video,
        token=(16, 16, 4),
        text=256,
        config=STGConfig.preset("hunyuan-video"),
        guidance_scale=None,
        videos=(Video(512, 320, 61),),
        small=Video(256, 256, 5),
        cpu_changes=_heads(2, 128, num_layers=10, num_single_layers=20, text_embed_dim=352, pooled_projection_dim=64),
        cpu_video=Video(96, 96, 13),
        cpu_layers=(1,),
    ),
    Model(
        name="wan-2.1-1.3b",
        title="Wan 2.1 1.3B",
        **_WAN,
        changes=_heads(12, 128, ffn_dim=8960, num_layers=30),
        config=STGConfig.preset("wan-2.1-1.3b-community", arithmetic="float32"),
        cpu_changes=_heads(2, 128, ffn_dim=1488, num_layers=10, text_dim=512),
        cpu_video=Video(96, 96, 17),
        cpu_layers=(2,),
    ),
    Model(
        name="wan-2.1-14b",
        title="Wan 2.1 14B",
        **_WAN,
        config=STGConfig.preset("wan-2.1-14b-community", arithmetic="float32"),
        cpu_changes=_heads(2, 128, ffn_dim=688, num_layers=13, text_dim=256),
        cpu_video=Video(96, 96, 21),
        cpu_layers=(2,),
    ),
)

CASES: dict[str, Case] = {case.name: case for model in MODELS for case in model.cases()}


def find(names: str | Sequence[str]) -> list[Case]:
    """The cases of these names; "true", "small" and "cpu" are all of that kind, "all" is every case.

    In the order of the names, each once. ValueError names what is unknown and what is allowed.
    """
    found: dict[str, Case] = {}
    for name in [names] if isinstance(names, str) else names:
        if name in CASES:
            found[name] = CASES[name]
        elif name == "all" or name in KINDS:
            found |= {case.name: case for case in CASES.values() if name in ("all", case.kind)}
        else:
            allowed = ", ".join(["all", *KINDS, *CASES])
            raise ValueError(f"case={name!r} is not known; choose one of {allowed}")
    return list(found.values())
