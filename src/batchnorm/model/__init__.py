"""Verbs on whole models."""

from batchnorm.model.fold import fold
from batchnorm.model.fold_report import FoldReport
from batchnorm.model.hold import hold
from batchnorm.model.memory_efficient import memory_efficient

__all__ = ["FoldReport", "fold", "hold", "memory_efficient"]
