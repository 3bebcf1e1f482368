"""Faults against the data: running statistics that are not the population's, data that are not theirs."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tests.doctor.data.digits import Case, Make
from tests.doctor.heldout import nets
from tests.doctor.heldout.cases import Change, judged
from tests.doctor.heldout.changes import filled, in_layer, scaled
from tests.doctor.heldout.datasets import Batches, batches
from tests.doctor.heldout.training import adam, cross_entropy, fit


def ema_of_parameters_by_hand() -> Case:
    """As in many a repository: a copy of the model made early, in which parameters alone are averaged."""
    torch.manual_seed(2)
    model = nets.DenseNet()
    data = batches("digits", 64, most=100)
    optimizer = adam(model)
    fit(model, data[:8], 1, optimizer, cross_entropy)
    average = copy.deepcopy(model)

    def update(source: nn.Module) -> None:
        with torch.no_grad():
            for mine, its in zip(average.parameters(), source.parameters(), strict=True):
                mine.lerp_(its, 0.05)

    fit(model, data, 6, optimizer, cross_entropy, update)
    return average.train(), batches("digits", 64), {}


def means_off(layer: str, deviations: float) -> Change:
    return in_layer(layer, lambda norm: norm.running_mean.add_(deviations * norm.running_var.sqrt()))


def fine_tuned_from_another_preprocessing(model: nn.Module) -> None:
    """Statistics of images from 0 to 255."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.mul_(3.0)
            layer.running_var.mul_(9.0)


def ill_timed_recalibration(model: nn.Module) -> None:
    """Statistics of three steps at momentum 0.1, on top of the first ones."""
    was = model.training
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()
    model.train()
    with torch.no_grad():
        for x, _ in batches("digits", 64, most=3):
            model(x)
    model.train(was)


def inverted(given: Batches) -> Batches:
    return [(0.7 / 0.37 - x, y) for x, y in given]


SICK: list[tuple[str, Make, str, str | None]] = [
    (
        "variance four times too large",
        judged("densenet", change=filled("features.6.running_var", lambda v: 4 * v)),
        "BN202",
        "features.6",
    ),
    (
        "variances 2.5 times too small",
        judged("unet", training=True, change=filled("merge1.1.running_var", lambda v: v / 2.5)),
        "BN202",
        "merge1.1",
    ),
    (
        "means half a std off",
        judged("rep vgg", training=True, change=means_off("5.large.1", 0.5)),
        "BN202",
        "5.large.1",
    ),
    (
        "one channel's variance 100 times too large",
        judged(
            "mobilenet v3",
            training=True,
            change=filled("blocks.0.block.1.running_var", lambda v: 100 * v, slice(5, 6)),
        ),
        "BN202",
        "blocks.0.block.1",
    ),
    (
        "statistics of an audio layer 9 times too large",
        judged("audio", training=True, change=filled("5.running_var", lambda v: 9 * v)),
        "BN202",
        "5",
    ),
    (
        "statistics of an audio layer 9 times too large, end to end",
        judged("audio", training=True, change=filled("5.running_var", lambda v: 9 * v)),
        "BN201",
        "5",
    ),
    ("tabular means off by a std", judged("cancer", training=True, change=means_off("5", 1.0)), "BN202", "5"),
    (
        "statistics of three steps",
        judged("rep vgg", training=True, change=ill_timed_recalibration),
        "BN202",
        "1",
    ),
    ("ema of the parameters by hand", ema_of_parameters_by_hand, "BN202", "features.6"),
    (
        "statistics of another preprocessing",
        judged("densenet", training=True, change=fine_tuned_from_another_preprocessing),
        "BN201",
        "features.1.norm",
    ),
    (
        "statistics of a model ten steps old",
        judged("rep vgg, ten steps", training=True, optimizer=True),
        "BN202",
        "1",
    ),
    ("test images inverted", judged("rep vgg", on=inverted), "BN215", "1"),
    ("test sounds three times as loud", judged("audio", on=scaled(3.0)), "BN215", "1"),
    ("test images from 0 to 255", judged("unet", on=scaled(63.75, 114.75)), "BN215", "down1.1"),
]
