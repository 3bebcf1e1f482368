"""Verbs on whole models."""

from batchnorm.model.convert import convert, revert
from batchnorm.model.hold import hold
from batchnorm.model.memory_efficient import memory_efficient

__all__ = ["convert", "hold", "memory_efficient", "revert"]
