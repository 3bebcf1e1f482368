"""Faults in what a layer stores: lost or impossible statistics, scales and shifts."""

from __future__ import annotations

import torch
from torch import nn

from tests.doctor.data.digits import Make
from tests.doctor.heldout import nets
from tests.doctor.heldout.cases import Change, judged, untrained
from tests.doctor.heldout.changes import filled, in_layer


def both(*changes: Change) -> Change:
    def change(model: nn.Module) -> None:
        for one in changes:
            one(model)

    return change


def reset_statistics(layer: str) -> Change:
    return in_layer(layer, lambda norm: norm.reset_running_stats())


SICK: list[tuple[str, Make, str, str | None]] = [
    (
        "statistics of one layer lost",
        judged("unet", change=reset_statistics("middle.4")),
        "BN108",
        "middle.4",
    ),
    (
        "statistics lost, no data",
        judged("recurrent", data=False, change=reset_statistics("after")),
        "BN108",
        "after",
    ),
    (
        "statistics not loaded, counter is",
        judged(
            "densenet",
            change=both(
                filled("features.6.running_mean", torch.zeros_like),
                filled("features.6.running_var", torch.ones_like),
            ),
        ),
        "BN108",
        "features.6",
    ),
    (
        "one variance is NaN",
        judged("audio", change=filled("5.running_var", lambda v: v * float("nan"), slice(3, 4))),
        "BN109",
        "5",
    ),
    (
        "one variance is negative",
        judged("conv vit", data=False, change=filled("head_bn.running_var", torch.neg, slice(3, 4))),
        "BN109",
        "head_bn",
    ),
    (
        "one variance is inf",
        judged("video", data=False, change=filled("5.running_var", lambda v: v + float("inf"), slice(3, 4))),
        "BN109",
        "5",
    ),
    (
        "half of the scales are dead",
        judged("rep vgg", change=filled("3.large.1.weight", torch.zeros_like, slice(0, 8))),
        "BN110",
        "3.large.1",
    ),
    (
        "all scales are dead",
        judged("mobilenet v3", change=filled("last.1.weight", lambda w: w * 1e-5)),
        "BN110",
        "last.1",
    ),
    (
        "a scale is NaN",
        judged("autoencoder", change=filled("encoder.1.weight", lambda w: w * float("nan"), slice(2, 3))),
        "BN115",
        "encoder.1",
    ),
    (
        "a shift is inf",
        judged("point net", data=False, change=filled("bn3.bias", lambda w: w + float("inf"), slice(0, 1))),
        "BN115",
        "bn3",
    ),
    (
        "beta of one",
        untrained(nets.audio_net, "tones", 32, change=filled("5.bias", torch.ones_like)),
        "BN116",
        "5",
    ),
]
