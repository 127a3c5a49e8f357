"""Model families. Importing this package registers the built-in ones."""

from stg_engine.models import ltx
from stg_engine.models.base import ModelSpec, register, spec_of, supported

__all__ = ["ModelSpec", "ltx", "register", "spec_of", "supported"]
