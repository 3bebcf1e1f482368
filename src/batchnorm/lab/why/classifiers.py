"""What experiments 6 to 9 share: a small convolutional network, and how it is trained and tested."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.data import Dataset
from batchnorm.lab.why.images import load_images
from batchnorm.lab.why.training import minibatches

Norm = Callable[[int], nn.Module]

_TEST_BATCH = 500


@dataclass(frozen=True)
class Setting:
    """How many images to train on, how often, and how many to test with."""

    train_images: int
    epochs: int
    test_images: int

    def data(self) -> Dataset:
        """The first images of Fashion-MNIST, or of digits where that is missing."""
        return load_images("fashion-mnist").head(self.train_images, self.test_images)


class ConvNet(nn.Sequential):
    """Three 3x3 convolutions of stride 2, each normalised and rectified, their mean, and 10 logits.

    Args:
        norm: makes the layer after a convolution of so many channels.
        width: channels of the first convolution; 2 and 4 times as many in the next ones.
        dropout_before: rate of the dropout before the second and third convolution.
        dropout_behind: rate of the dropout behind the last normalisation.
    """

    def __init__(
        self, norm: Norm, width: int = 12, *, dropout_before: float = 0.0, dropout_behind: float = 0.0
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
            *([nn.Dropout(dropout_behind)] if dropout_behind else []),
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
    on_steps: Callable[[int], None],
    before_step: Callable[[float], None] = lambda progress: None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> None:
    """Train by SGD with momentum 0.9, the rate falling from `lr` to 0 along half a cosine.

    Equal seeds and batch sizes see equal batches.

    Args:
        on_steps: told 1 after each epoch.
        before_step: told which share of the training is done.
        parameters: those to train; None is all.
    """
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr, momentum=0.9)
    batches = minibatches(len(data.train_labels), batch_size, seed)
    per_epoch = len(data.train_labels) // batch_size
    model.train()
    for step in range(epochs * per_epoch):
        progress = step / (epochs * per_epoch)
        before_step(progress)
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * progress)) / 2
        batch = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch]).backward()
        optimizer.step()
        if (step + 1) % per_epoch == 0:
            on_steps(1)


@torch.no_grad()
def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The images that a model classifies wrongly in eval mode, in percent; it stays in eval mode."""
    model.eval()
    wrong = sum(
        int((model(batch).argmax(1) != wanted).sum())
        for batch, wanted in zip(images.split(_TEST_BATCH), labels.split(_TEST_BATCH), strict=True)
    )
    return 100 * wrong / len(labels)


def test_error(model: nn.Module, data: Dataset) -> float:
    """`error` on the test set."""
    return error(model, data.test_images, data.test_labels)


def less(a: Iterable[float], b: Iterable[float]) -> list[float]:
    """Seed by seed, a - b."""
    return [x - y for x, y in zip(a, b, strict=True)]
