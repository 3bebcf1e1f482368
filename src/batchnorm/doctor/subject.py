"""What is examined: the model, its batch norms, what trains it, and what was observed on data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer


@dataclass
class Subject:
    """Everything that a check may look at; checks change none of it.

    Attributes:
        model: the model, in the mode in which it was given.
        batch_norms: its batch norms by qualified name, each module once (torch's, ours, SyncBatchNorm).
        optimizer: the optimizer that trains it, or None.
        loss: a function of `(output, batch)`, or None.
        forward: a function `(model, batch) -> output`, or None for `batchnorm.model.calling`'s rules.
        batches: a handful of batches of the loader; empty where no loader was given.
        observed: what `doctor.data.observe` measured on the batches; None without data.
    """

    model: nn.Module
    batch_norms: dict[str, nn.Module]
    optimizer: Optimizer | None = None
    loss: Callable[[Any, Any], Any] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    batches: list[Any] = field(default_factory=list)
    observed: Any = None
