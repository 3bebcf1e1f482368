"""What the experiments share of training: layers with or without a norm, minibatches, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def perceptron(
    sizes: Sequence[int], norm: Callable[[int], nn.Module] | None, activation: Callable[[], nn.Module]
) -> nn.Sequential:
    """Linear layers of the given sizes, all but the last followed by the norm, if any, and the activation.

    Takes images of any shape. A layer before a norm has no bias: the norm would take it away again.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes[:-1]):
        layers.append(nn.Linear(inputs, outputs, bias=norm is None))
        if norm is not None:
            layers.append(norm(outputs))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def minibatches(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batch after batch, for ever: every epoch in a new order, without its incomplete end.

    Raises:
        ValueError: there are fewer samples than a batch holds.
    """
    if samples < batch_size:
        raise ValueError(f"{samples} samples do not fill a batch of {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from order[: samples - samples % batch_size].view(-1, batch_size)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that a model classifies rightly in eval mode; its mode is then as it was."""
    training = model.training
    model.eval()
    right = (model(images).argmax(1) == labels).double().mean().item()
    model.train(training)
    return right


def checkpoints(steps: int, count: int) -> list[int]:
    """About so many steps at which to look, from 0 to `steps`, closer together early in training."""
    ratio = steps ** (1 / (count - 2))
    return sorted({0, steps, *(round(ratio**k) for k in range(count - 1))})
