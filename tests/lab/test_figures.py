"""Figures are PNG pictures of a sensible size, for one epoch as for many."""

import struct

import pytest

from batchnorm.lab.figures import training_curves
from batchnorm.lab.recipes import configure
from batchnorm.lab.train import EpochResult


@pytest.mark.parametrize("epochs", [1, 12])
@pytest.mark.parametrize("protocol", [False, True])
def test_training_curves(epochs: int, protocol: bool) -> None:
    extra = {"mean_loss": 0.5, "accuracy_eval": 0.8} if protocol else {}
    history = [EpochResult(epoch + 1, 1 / (epoch + 1), 0.7, 1.0, **extra) for epoch in range(epochs)]
    image = training_curves(configure(tutorial_protocol=protocol), history)
    assert image.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", image[16:24])
    assert (width, height) == (1170, 468)
