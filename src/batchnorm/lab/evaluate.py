"""Accuracy on the test set: in eval mode by the running statistics, or as the tutorial tests."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.lab.data import Dataset
from batchnorm.lab.processes import ALONE, World, unsynchronised
from batchnorm.model import hold

_TEST_BATCH = 1000


@torch.inference_mode()
def test_accuracy(model: nn.Module, dataset: Dataset, world: World = ALONE) -> float:  # noqa: PT028
    """Share of the test set that is classified right in eval mode, by the running statistics."""
    model.eval()
    return _accuracy(model, dataset, _TEST_BATCH, world)


def test_accuracy_by_batch(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    world: World = ALONE,  # noqa: PT028
) -> float:
    """The same in training mode, as the tutorial tests: each test batch normalised by itself.

    As there, autograd records the passes; the hand-written layer keeps what they record. A single
    leftover sample is classified by the running statistics.
    """
    model.train()
    with hold(model), unsynchronised(model):
        return _accuracy(model, dataset, batch_size, world)


def _accuracy(model: nn.Module, dataset: Dataset, batch_size: int, world: World) -> float:
    """Over all processes, to whom the batches are dealt out whole: the numbers are those of one."""
    images, labels = dataset.test_images.split(batch_size), dataset.test_labels.split(batch_size)
    mine = slice(world.rank, None, world.size)
    right = torch.zeros((), dtype=torch.int64, device=dataset.test_labels.device)
    for batch, wanted in zip(images[mine], labels[mine], strict=True):
        if len(wanted) == 1:
            model.eval()
        right += (model(batch).argmax(1) == wanted).sum()
    return world.add(right).item() / len(dataset.test_labels)
