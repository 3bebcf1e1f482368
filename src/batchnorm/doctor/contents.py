"""What a batch holds, known before it goes through the model: how many samples, and of which classes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.model.nested import samples_in, tensors_in
from batchnorm.model.packing import sent

# So many samples at most.
_SHUFFLED = 4096


@sent
@dataclass(frozen=True, eq=False)
class Contents:
    """Of one batch.

    Attributes:
        samples: how many; 0 where that cannot be told.
        labels: the class of each, (N,), or None.
        spread: the standard deviation of the first real numbers in it; None without any.
    """

    samples: int
    labels: Tensor | None
    spread: float | None = None

    @classmethod
    def of(cls, batch: Any) -> Contents:
        """The samples and the labels of a batch as a loader gives it."""
        return cls(samples_in(batch), labels(batch), _spread(batch))


def _spread(batch: Any) -> float | None:
    for tensor in tensors_in(batch):
        if tensor.is_floating_point() and tensor.numel() > 1:
            return float(tensor.detach().double().std())
    return None


def labels(batch: Any) -> Tensor | None:
    """The class of each sample, where a batch is `(inputs, integers of shape (N,))`."""
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        return None
    y = batch[1]
    return None if y.is_floating_point() or y.ndim != 1 or y.dtype == torch.bool else y.cpu().long()


def in_order(of_ranks: Sequence[Sequence[Contents]]) -> list[tuple[int, int]]:
    """Of all batches, as one process would have them, the place of the rank and its number there.

    The first batch of each rank, then the second of each: a loader whose batches are dealt out one by one
    is in its own order again.
    """
    found = [(place, number) for place, own in enumerate(of_ranks) for number in range(len(own))]
    return sorted(found, key=lambda batch: (batch[1], batch[0]))


def shuffled(batches: Sequence[Contents]) -> int:
    """How many, from the first on, BN217 shuffles: its cost grows with the square of their samples."""
    so_far = itertools.accumulate(batch.samples for batch in batches)
    return max(2, sum(samples <= _SHUFFLED for samples in so_far))
