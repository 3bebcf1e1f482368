"""Verbs on whole models."""

from batchnorm.model.absorb import absorb_bias
from batchnorm.model.adapt import adapt
from batchnorm.model.convert import ConversionReport, conversion_report, convert, revert
from batchnorm.model.folding.fold import fold
from batchnorm.model.folding.report import FoldReport
from batchnorm.model.freeze import freeze, unfreeze
from batchnorm.model.hold import hold
from batchnorm.model.joinable import Joinable
from batchnorm.model.keras import load_keras
from batchnorm.model.memory_efficient import memory_efficient
from batchnorm.model.merge_running_statistics import merge_running_statistics
from batchnorm.model.parameter_groups import parameter_groups
from batchnorm.model.recalibrate import recalibrate
from batchnorm.model.recalibration_report import RecalibrationReport, recalibration_report
from batchnorm.model.registry import register
from batchnorm.model.reset import reset

__all__ = [
    "ConversionReport",
    "FoldReport",
    "Joinable",
    "RecalibrationReport",
    "absorb_bias",
    "adapt",
    "conversion_report",
    "convert",
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
