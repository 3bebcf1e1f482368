"""Verbs on whole models."""

from batchnorm.model.hold import hold
from batchnorm.model.memory_efficient import memory_efficient

__all__ = ["hold", "memory_efficient"]
