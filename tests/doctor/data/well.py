"""Ways to a healthy model: untrained, trained, frozen, converted, recalibrated, fine-tuned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import batchnorm as bn
from tests.doctor.data.digits import CLASSES, Case, Make, batches, new, train, trained


def untrained(name: str, size: int = 32, count: int = 8) -> Make:
    def make() -> Case:
        model, shape, classes = new(name)
        return model, batches(shape, size, count, classes=classes), {}

    return make


def after_training(
    name: str,
    size: int = 32,
    count: int = 8,
    change: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> Make:
    def make() -> Case:
        model, shape, classes = trained(name, size)
        if change is not None:
            change(model)
        return model, batches(shape, size, count, classes=classes, **options), {}

    return make


def fine_tuned(model: nn.Module) -> None:
    """Frozen batch norms, and some more steps of the rest."""
    bn.freeze(model)
    train(model, (3, 16, 16), 8, CLASSES, steps=10, rate=0.005)


def recalibrated(name: str) -> Make:
    def make() -> Case:
        model, shape, classes = trained(name)
        bn.recalibrate(model, batches(shape, 32, 16, classes=classes))
        return model, batches(shape, 32, 8, classes=classes), {}

    return make


def converted(name: str, is_trained: bool) -> Make:
    def make() -> Case:
        model, shape, classes = trained(name) if is_trained else new(name)
        return bn.convert(model), batches(shape, classes=classes), {}

    return make


def without_dropout(name: str) -> Make:
    """The healthy twin of a model whose dropout shifts the variances."""

    def make() -> Case:
        model, shape, classes = new(name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return train(model, shape, 32, classes), batches(shape, classes=classes), {}

    return make
