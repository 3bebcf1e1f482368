"""Batch normalization done right for PyTorch."""

from batchnorm.functional import batch_norm
from batchnorm.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from batchnorm.model import hold, memory_efficient
from batchnorm.moments import Moments
from batchnorm.renorm import Renorm

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Renorm",
    "batch_norm",
    "hold",
    "memory_efficient",
]
