"""Batch normalization done right for PyTorch."""

from batchnorm.doctor.diagnose import diagnose
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.report import Report
from batchnorm.functional import batch_norm
from batchnorm.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from batchnorm.model import (
    FoldReport,
    Joinable,
    absorb_bias,
    adapt,
    convert,
    fold,
    freeze,
    hold,
    load_keras,
    memory_efficient,
    merge_running_statistics,
    parameter_groups,
    recalibrate,
    reset,
    revert,
    unfreeze,
)
from batchnorm.moments import Moments
from batchnorm.renorm import Renorm

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Finding",
    "FoldReport",
    "Joinable",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Renorm",
    "Report",
    "absorb_bias",
    "adapt",
    "batch_norm",
    "convert",
    "diagnose",
    "fold",
    "freeze",
    "hold",
    "load_keras",
    "memory_efficient",
    "merge_running_statistics",
    "parameter_groups",
    "recalibrate",
    "reset",
    "revert",
    "unfreeze",
]
