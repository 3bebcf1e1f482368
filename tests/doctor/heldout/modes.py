"""Faults of mode: training where eval is meant, frozen in part."""

from __future__ import annotations

import torch
from torch import nn

from tests.doctor.data.digits import Case, Make
from tests.doctor.heldout.cases import Change, judged
from tests.doctor.heldout.changes import in_layer
from tests.doctor.heldout.datasets import batches
from tests.doctor.heldout.training import trained


def in_training(layer: str) -> Change:
    return in_layer(layer, nn.Module.train)


def evaluated_in_training_mode() -> Case:
    model, _ = trained("densenet")
    test = batches("digits", 64, test=True)
    model.train()

    def evaluate() -> int:
        with torch.no_grad():
            return sum(int((model(x).argmax(1) == y).sum()) for x, y in test)

    return model, [], {"evaluate": evaluate}


def half_frozen(layer: str, *, weights: bool, mode: bool) -> Change:
    return in_layer(layer, lambda norm: norm.train(mode).requires_grad_(weights))


SICK: list[tuple[str, Make, str, str | None]] = [
    (
        "one layer in training mode",
        judged("densenet", change=in_training("features.4.norm")),
        "BN111",
        "features.4.norm",
    ),
    (
        "one layer in training mode, tabular",
        judged("cancer", data=False, change=in_training("5")),
        "BN111",
        "5",
    ),
    (
        "weights fixed, statistics moving",
        judged(
            "unet", training=True, optimizer=True, change=half_frozen("down1.1", weights=False, mode=True)
        ),
        "BN112",
        "down1.1",
    ),
    (
        "eval mode, weights learning",
        judged(
            "rep vgg",
            training=True,
            optimizer=True,
            change=half_frozen("3.small.1", weights=True, mode=False),
        ),
        "BN112",
        "3.small.1",
    ),
    ("test loop in training mode", evaluated_in_training_mode, "BN117", "features.1.norm"),
]
