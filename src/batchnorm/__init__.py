"""Batch normalization done right for PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING

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
    ConversionReport,
    FoldReport,
    Joinable,
    RecalibrationReport,
    absorb_bias,
    adapt,
    conversion_report,
    convert,
    fold,
    freeze,
    hold,
    load_keras,
    memory_efficient,
    merge_running_statistics,
    parameter_groups,
    recalibrate,
    recalibration_report,
    register,
    reset,
    revert,
    unfreeze,
)
from batchnorm.moments import Moments
from batchnorm.renorm import Renorm

if TYPE_CHECKING:
    from batchnorm.doctor.diagnose import diagnose
    from batchnorm.doctor.finding import Finding
    from batchnorm.doctor.report import Report

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConversionReport",
    "Finding",
    "FoldReport",
    "Joinable",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "RecalibrationReport",
    "Renorm",
    "Report",
    "absorb_bias",
    "adapt",
    "batch_norm",
    "conversion_report",
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
    "recalibration_report",
    "register",
    "reset",
    "revert",
    "unfreeze",
]

# Imported when first used: training does not need them.
_LATER = {
    "diagnose": "batchnorm.doctor.diagnose",
    "Finding": "batchnorm.doctor.finding",
    "Report": "batchnorm.doctor.report",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
