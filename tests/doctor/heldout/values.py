"""Faults in the values of a batch: too few, constant, dead, far from zero, padded, not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.doctor.data.digits import Make
from tests.doctor.heldout import nets
from tests.doctor.heldout.cases import judged, untrained
from tests.doctor.heldout.changes import filled, scaled
from tests.doctor.heldout.datasets import Batches


class Overflowing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 3).log()


def timestamps(given: Batches) -> Batches:
    """A column of seconds since 1970 among the features."""
    out = []
    for x, y in given:
        x = x.clone()
        x[:, 4] = 1.7e9 + 3e4 * x[:, 4]
        out.append((x, y))
    return out


def zeroed_columns(given: Batches) -> Batches:
    return [(torch.cat([x[:, :9], torch.zeros_like(x[:, 9:])], 1), y) for x, y in given]


SICK: list[tuple[str, Make, str, str | None]] = [
    (
        "patches of photographs in twos",
        judged("unet in twos", training=True, optimizer=True),
        "BN203",
        "down1.1",
    ),
    ("three values per channel", judged("cancer", training=True, size=3), "BN203", "1"),
    ("two values per channel", judged("wine", training=True, size=2), "BN203", "1"),
    ("four channels of zeros", judged("raw wine", training=True, on=zeroed_columns), "BN204", "0"),
    (
        "dead filters",
        judged("rep vgg", training=True, change=filled("3.large.0.weight", torch.zeros_like, slice(0, 6))),
        "BN204",
        "3.large.1",
    ),
    (
        "a third dead after ReLU",
        judged("unet", training=True, size=16, change=filled("down2.1.bias", lambda b: b - 12, slice(0, 6))),
        "BN205",
        "down2.1",
    ),
    (
        "half dead after ReLU, tabular",
        judged("cancer", training=True, change=filled("5.bias", lambda b: b - 20, slice(0, 24))),
        "BN205",
        "5",
    ),
    (
        "inputs scaled away",
        untrained(
            lambda: nn.Sequential(*nets.conv_bn(3, 8), nn.ReLU(), nn.Conv2d(8, 1, 1)),
            "photos",
            16,
            on=scaled(1e-3),
        ),
        "BN206",
        "1",
    ),
    ("a column of seconds since 1970", judged("raw wine", training=True, on=timestamps), "BN207", "0"),
    (
        "an offset of 5000 stds",
        untrained(
            lambda: nets.tabular_net(13, 3, inputs_normalised=True), "wine", 32, on=scaled(1.0, 5000.0)
        ),
        "BN207",
        "0",
    ),
    ("padding in sentences", judged("text", training=True), "BN208", "bn"),
    (
        "log of what may be negative",
        untrained(
            lambda: nn.Sequential(nn.Linear(13, 24), nn.BatchNorm1d(24), Overflowing(), nn.Linear(24, 3)),
            "wine",
            64,
        ),
        "BN209",
        "2",
    ),
    (
        "a weight is NaN",
        judged(
            "unet", training=True, change=filled("middle.0.weight", lambda w: w * float("nan"), slice(0, 1))
        ),
        "BN209",
        "middle.0",
    ),
]
