"""The losses of an epoch, and what is reported of them."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.lab.processes import World


class Losses:
    """The losses of an epoch, summed on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.of_samples = torch.zeros((), device=device)
        self.of_batches = torch.zeros((), device=device)
        self.samples = 0
        self.batches = 0

    def add(self, loss: Tensor, samples: int, batches: int = 1) -> None:
        """Add the mean loss of a batch of so many samples, or the sum of those of several batches."""
        self.of_samples += loss * samples
        self.of_batches += loss
        self.samples += samples * batches
        self.batches += batches

    def add_processes(self, world: World) -> None:
        """Add what the other processes have, who counted the same samples."""
        sums = world.add(torch.stack([self.of_samples, self.of_batches]))
        self.of_samples, self.of_batches = sums.unbind()

    def mean(self) -> float:
        """Per sample."""
        return self.of_samples.item() / self.samples

    def tutorial(self, batch_size: int) -> float:
        """As the tutorial divides it: a mean over the batch, once more divided by the batch size."""
        return self.of_batches.item() / (self.batches * batch_size)
