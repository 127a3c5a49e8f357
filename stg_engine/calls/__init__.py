"""How diffusers pipelines call their model in a denoising step, by class name of the pipeline."""

from stg_engine.calls.base import Calls, Step
from stg_engine.calls.batched import Batched, FixedScale, LateScale, PerFrame, SameDtype
from stg_engine.calls.own_passes import OwnPasses
from stg_engine.calls.sequential import Sequential, TrueCFG, TwoModels

PIPELINES: dict[str, type[Calls]] = {
    "LTXPipeline": Batched,
    "LTXImageToVideoPipeline": Batched,
    "LTXConditionPipeline": Batched,
    "LTX2Pipeline": OwnPasses,
    "LTX2ImageToVideoPipeline": OwnPasses,
    "LTX2ConditionPipeline": OwnPasses,
    "MochiPipeline": Batched,
    "CogVideoXPipeline": LateScale,
    "CogVideoXImageToVideoPipeline": LateScale,
    "CogVideoXVideoToVideoPipeline": LateScale,
    "CogVideoXFunControlPipeline": LateScale,
    "WanPipeline": TwoModels,
    "WanImageToVideoPipeline": TwoModels,
    "WanVideoToVideoPipeline": TwoModels,
    "SkyReelsV2Pipeline": TwoModels,
    "SkyReelsV2ImageToVideoPipeline": TwoModels,
    "SkyReelsV2DiffusionForcingPipeline": TwoModels,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": TwoModels,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": TwoModels,
    "HunyuanVideoPipeline": TrueCFG,
    "HunyuanVideoImageToVideoPipeline": TrueCFG,
    "HunyuanSkyreelsImageToVideoPipeline": TrueCFG,
    "LattePipeline": SameDtype,
    "AllegroPipeline": SameDtype,
    "SanaVideoPipeline": FixedScale,
    "StableVideoDiffusionPipeline": PerFrame,
}
"""Subclasses of a pipeline match too."""

__all__ = [
    "PIPELINES",
    "Batched",
    "Calls",
    "FixedScale",
    "LateScale",
    "OwnPasses",
    "PerFrame",
    "SameDtype",
    "Sequential",
    "Step",
    "TrueCFG",
    "TwoModels",
]
