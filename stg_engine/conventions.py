"""Published ways of combining, as fields of `STGConfig`; the layers are the user's or a model's.

Each names the implementation and version that it reproduces. Where that has a defect, the engine does what is meant,
and the note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STGUIDANCE = "junhahyung/STGuidance df04da0 (2025-04-07)"
LIGHTRICKS = "Lightricks/LTX-Video 5260738 (2025-10-25)"
LTX_2 = "Lightricks/LTX-2 400fd31 (2026-08-16)"
DIFFUSERS = "huggingface/diffusers 58eb52c (2026-08-23)"
WAN_WRAPPER = "kijai/ComfyUI-WanVideoWrapper 721cd65 (2025-03-04)"
COMFYUI = "Lightricks/ComfyUI-LTXVideo aceeae9 (2026-06-30)"


@dataclass(frozen=True)
class Convention:
    """How an implementation skips and combines; the layers are the user's.

    fields  of `STGConfig`
    source  repository, version and file it was read from
    note    what it is, and where the engine differs
    """

    name: str
    fields: Mapping[str, Any]
    source: str
    note: str


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention(
            "stg",
            {"mode": "residual", "rescale_over": "batch", "rescale_cfg": True},
            f"{STGUIDANCE}, Mochi, CogVideoX and LTXVideo; {DIFFUSERS}, examples/community/pipeline_stg_*.py",
            "u + g (c - u) + s (c - p) in float32, one std over the batch, also in steps of CFG alone. There cond is "
            "skipped as well for several prompts (community) and the weak model sampled alone without CFG; not here",
        ),
        Convention(
            "ltx-video",
            {"mode": "attention", "cfg_star": True, "arithmetic": "model"},
            f"{LIGHTRICKS}, ltx_video/pipelines/pipeline_ltx_video.py",
            "CFG-star, std of each video, in the model's dtype; its rescale r=1 means off, here 0. There skips land on "
            "rows of other prompts, CFG-star fails for several videos, the strategy residual does nothing; not here",
        ),
        Convention(
            "ltx-2",
            {"mode": "attention", "space": "x0", "rescale_over": "batch", "rescale_cfg": True},
            f"{LTX_2}, ltx-core guiders",
            "x0 with sigma per token, one std over batch and modality. There a scale may be negative and a modality "
            "with scale 0 is not skipped; here every listed layer skips in video and audio",
        ),
        Convention(
            "ltx-2-diffusers",
            {"mode": "attention", "space": "x0", "rescale_cfg": True},
            f"{DIFFUSERS}, src/diffusers/pipelines/ltx2/pipeline_ltx2.py",
            "x0 with one sigma for all tokens, std of each video. There LTX-2.0 ignores the layers (perturbed_attn is "
            "false) and audio scale 0 means the video's; here layers skip and 0 is 0",
        ),
        Convention(
            "wan-official",
            {"mode": "residual", "weak_pass": "negative_prompt", "arithmetic": "model"},
            f"{STGUIDANCE}, Wan2.1/pipeline.py",
            "q + s (q - p) with q = u + g (c - u) and p on the negative prompt",
        ),
        Convention(
            "wan",
            {"mode": "residual", "arithmetic": "model"},
            f"{DIFFUSERS}, examples/community/pipeline_stg_wan.py",
            "u + g (c - u) + s (c - p). There layers out of range and a call without CFG are ignored; here the "
            "first are refused and the second is c + s (c - p)",
        ),
        Convention(
            "slg-uncond",
            {"mode": "residual", "weak_pass": "uncond"},
            f"{WAN_WRAPPER}, WanVideoSLG; also deepbeepmeep/Wan2GP and KJNodes",
            "u + g (c - u) with u skipped: no further pass and no scale of its own. There nothing happens without CFG; "
            "here that is refused",
        ),
        Convention(
            "comfyui",
            {"mode": "attention", "space": "x0", "cfg_star": True, "rescale_over": "batch", "rescale_cfg": True},
            f"{COMFYUI}, stg.py, STGGuiderAdvanced",
            "x0, CFG-star, one std over the batch; its presets are read by stg_engine.comfyui",
        ),
    )
}
