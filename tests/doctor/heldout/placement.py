"""Faults of place: biases, dropout, logits and pooling before batch norm, one batch norm in two places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.doctor.data.digits import Make
from tests.doctor.heldout import nets
from tests.doctor.heldout.cases import judged, untrained
from tests.doctor.heldout.changes import replaced


def with_bias(layer: nn.Module) -> nn.Module:
    """The layer with a bias, as torch starts it."""
    if isinstance(layer, nn.Linear):
        new: Any = nn.Linear(layer.in_features, layer.out_features)
    else:
        assert isinstance(layer, nn.Conv2d)
        new = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            groups=layer.groups,
        )
    new.weight.data.copy_(layer.weight.data)
    return new


class Pooled(nn.Module):
    """A context branch as in ASPP: pooled to 1x1, convolved, normalised, spread out again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*nets.conv_bn(3, 8), nn.ReLU())
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), *nets.conv_bn(8, 8, 1), nn.ReLU())
        self.out = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(torch.cat([x, self.context(x).expand_as(x)], 1))


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
        )
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.one(x)))
        return self.fc(F.relu(self.norm(self.two(x))).mean((2, 3)))


class LogSoftmaxOfNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*nets.conv_bn(1, 12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc, self.norm = nn.Linear(12, 10), nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.norm(self.fc(self.body(x))), dim=1)


SICK: list[tuple[str, Make, str, str | None]] = [
    (
        "bias in a depthwise block",
        judged("mobilenet v3", change=replaced("blocks.1.block.3", with_bias), data=False),
        "BN101",
        "blocks.1.block.3",
    ),
    ("bias of a linear layer", judged("wine", change=replaced("4", with_bias)), "BN101", "4"),
    (
        "bias of a branch",
        judged("rep vgg", change=replaced("5.small.0", with_bias), data=False),
        "BN101",
        "5.small.0",
    ),
    (
        "dropout of 0.5 before batch norm",
        untrained(
            lambda: nn.Sequential(
                nn.Linear(13, 24), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(24), nn.Linear(24, 3)
            ),
            "wine",
            32,
        ),
        "BN103",
        "3",
    ),
    (
        "dropout of 0.1 before batch norm",
        untrained(
            lambda: nn.Sequential(
                nn.Linear(13, 24), nn.Dropout(0.1), nn.Tanh(), nn.BatchNorm1d(24), nn.Linear(24, 3)
            ),
            "wine",
            32,
        ),
        "BN103",
        "3",
    ),
    ("batch norm before log_softmax", untrained(LogSoftmaxOfNorm, "digits", 32), "BN104", "norm"),
    (
        "a context branch with one image",
        judged("unet", training=True, size=1, change=lambda model: Pooled()),
        "BN105",
        "context.2",
    ),
    ("one batch norm for two convolutions", untrained(SharedNorm, "digits", 32), "BN118", "norm"),
]
