"""Model families. Importing this package registers the built-in ones."""

from stg_engine.models import allegro, cogvideox, cosmos, hunyuan_video, latte, ltx, ltx2, mochi, sana_video, svd, wan
from stg_engine.models.base import ModelSpec, modules_at, modules_in_blocks, register, spec_of, supported

__all__ = [
    "ModelSpec",
    "allegro",
    "cogvideox",
    "cosmos",
    "hunyuan_video",
    "latte",
    "ltx",
    "ltx2",
    "mochi",
    "modules_at",
    "modules_in_blocks",
    "register",
    "sana_video",
    "spec_of",
    "supported",
    "svd",
    "wan",
]
