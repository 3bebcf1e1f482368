"""Verbs on whole models."""

from batchnorm.model.hold import hold
from batchnorm.model.memory_efficient import memory_efficient
from batchnorm.model.merge_running_statistics import merge_running_statistics

__all__ = ["hold", "memory_efficient", "merge_running_statistics"]
