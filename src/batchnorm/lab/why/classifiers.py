"""What the experiments with images share: data, a small convolutional network, and how it is trained and tested."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.data import DataError, Dataset, load

Norm = Callable[[int], nn.Module]

_TEST_BATCH = 500


@lru_cache(maxsize=4)
def images(train: int, test: int) -> Dataset:
    """The first standardized Fashion-MNIST images, or, where it is not at hand, scikit-learn's digits."""
    try:
        dataset = load("fashion-mnist", download=False)
    except DataError:
        dataset = load("digits")
    return dataset.head(train, test).standardized()


class ConvNet(nn.Sequential):
    """Three 3x3 convolutions of stride 2, each normalised and rectified, their mean over positions, 10 logits.

    Args:
        norm: makes the layer after a convolution of so many channels.
        width: channels of the first convolution; 2 and 4 times as many in the next ones.
        dropout_before: rate of the dropout before the second and third convolution.
        dropout_after: rate of the dropout behind the last normalisation.
    """

    def __init__(
        self, norm: Norm, width: int = 12, *, dropout_before: float = 0.0, dropout_after: float = 0.0
    ) -> None:
        def block(inputs: int, outputs: int, dropout: float) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            return [*([nn.Dropout(dropout)] if dropout else []), convolution, norm(outputs), nn.ReLU()]

        super().__init__(
            *block(1, width, 0.0),
            *block(width, 2 * width, dropout_before),
            *block(2 * width, 4 * width, dropout_before),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            *([nn.Dropout(dropout_after)] if dropout_after else []),
            nn.Linear(4 * width, 10),
        )


def fit(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    on_epoch: Callable[[], None],
    before_step: Callable[[float], None] = lambda progress: None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> None:
    """Train by SGD with momentum 0.9, the rate falling from `lr` to 0 along a half cosine.

    The order of the samples is that of `seed`: equal seeds and batch sizes see equal batches.

    Args:
        before_step: told which share of the training is done.
        parameters: those to train; None is all.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr, momentum=0.9)
    batch_size = min(batch_size, len(data.train_labels))
    per_epoch = len(data.train_labels) // batch_size
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(data.train_labels), generator=generator)
        shuffled, labels = data.train_images[order], data.train_labels[order]
        for step in range(per_epoch):
            progress = (epoch * per_epoch + step) / (epochs * per_epoch)
            before_step(progress)
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * progress)) / 2
            batch = slice(step * batch_size, (step + 1) * batch_size)
            optimizer.zero_grad()
            F.cross_entropy(model(shuffled[batch]), labels[batch]).backward()
            optimizer.step()
        on_epoch()


@torch.no_grad()
def error(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int = _TEST_BATCH) -> float:
    """Share of the samples that are classified wrong, in percent, in the mode that the model is in."""
    wrong = sum(
        int((model(batch).argmax(1) != wanted).sum())
        for batch, wanted in zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
    )
    return 100 * wrong / len(labels)


def test_error(model: nn.Module, data: Dataset) -> float:
    """`error` on the test set in eval mode."""
    return error(model.eval(), data.test_images, data.test_labels)
