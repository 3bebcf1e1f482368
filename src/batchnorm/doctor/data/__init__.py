"""Checks on a handful of batches: what is observed, and one file per family of checks on it."""

from batchnorm.doctor.data.observe import Observed, observe, total_steps

__all__ = ["Observed", "observe", "total_steps"]
