"""Checks on a handful of batches: what is observed, and one file per family of checks on it."""

from batchnorm.doctor.data import (  # noqa: F401 - importing registers the checks
    channels,
    composition,
    disagreement,
    failure,
    gap,
    magnitude,
    movement,
    running_statistics,
)
from batchnorm.doctor.data.layers import layers_of
from batchnorm.doctor.data.observe import observe, total_steps
from batchnorm.doctor.data.observed import Observed

__all__ = ["Observed", "layers_of", "observe", "total_steps"]
