"""Verbs on whole models."""

from batchnorm.model.hold import hold

__all__ = ["hold"]
