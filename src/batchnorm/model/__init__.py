"""Verbs on whole models."""

from batchnorm.model.freeze import freeze, unfreeze
from batchnorm.model.hold import hold
from batchnorm.model.memory_efficient import memory_efficient
from batchnorm.model.recalibrate import recalibrate

__all__ = ["freeze", "hold", "memory_efficient", "recalibrate", "unfreeze"]
