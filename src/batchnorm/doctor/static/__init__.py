"""Checks that need no data: one file per family, registered by importing this."""

from batchnorm.doctor.static import (
    affine,
    evaluation,
    frozen,
    handwritten,
    optimizer,
    placement,
    precision,
    settings,
    statistics,
    use,
)

__all__ = [
    "affine",
    "evaluation",
    "frozen",
    "handwritten",
    "optimizer",
    "placement",
    "precision",
    "settings",
    "statistics",
    "use",
]
