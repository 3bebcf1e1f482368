"""What is examined: the model, its batch norms, what trains it, and what was observed on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from batchnorm.doctor.contents import Contents
from batchnorm.doctor.handwritten import Handwritten, handwritten
from batchnorm.doctor.ranks import ALONE, Ranks
from batchnorm.doctor.structure import Call, calls_of


@dataclass
class Subject:
    """Everything that a check may look at; checks change none of it.

    Attributes:
        model: the model, in the mode in which it was given.
        batch_norms: its batch norms by qualified name, each module once (torch's, ours, SyncBatchNorm).
        optimizer: the optimizer that trains it, or None.
        loss: a function of `(output, batch)`, or None.
        forward: a function `(model, batch) -> output`, or None for `batchnorm.model.calling`'s rules.
        evaluate: a function without arguments that evaluates the model, or None.
        batches: a handful of batches of the loader; empty where no loader was given.
        ranks: the processes that diagnose it together.
        contents: of the batches of all ranks, in the order in which one process would have them.
        numbers: of this process's batches in that order.
        observed: what `doctor.data.observe` measured on the batches; None without data.
    """

    model: nn.Module
    batch_norms: Mapping[str, _BatchNorm]
    optimizer: Optimizer | None = None
    loss: Callable[[Any, Any], Any] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    evaluate: Callable[[], Any] | None = None
    batches: list[Any] = field(default_factory=list)
    ranks: Ranks = ALONE
    contents: list[Contents] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    observed: Any = None

    def __post_init__(self) -> None:
        if not self.contents:
            self.contents = [Contents.of(batch) for batch in self.batches]
            self.numbers = list(range(len(self.batches)))

    @classmethod
    def of(cls, model: nn.Module, **attributes: Any) -> Subject:
        """The model with the batch norms that it has now."""
        found = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
        return cls(model, found, **attributes)

    def again(self) -> Subject:
        """The same to be examined anew, after the model has changed."""
        kept = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return Subject.of(**{name: kept[name] for name in kept if name not in ("batch_norms", "observed")})

    @cached_property
    def calls(self) -> list[Call]:
        """The calls of the model's forward, as far as they can be followed without running it."""
        return calls_of(self.model)

    @cached_property
    def handwritten(self) -> dict[str, Handwritten]:
        """Batch norms that are no module of torch's or ours, by qualified name."""
        return handwritten(self.model)

    @cached_property
    def optimizer_has_stepped(self) -> bool:
        """Whether there is an optimizer that has made a step that left state (momentum, Adam's averages)."""
        return self.optimizer is not None and any(self.optimizer.state.values())

    def is_trained(self, layer: nn.Module) -> bool:
        """Whether the layer's weights are not its first ones: its shifts differ from channel to channel.

        Scales may be drawn at random from the start (DCGAN), shifts are not. Without shifts, the optimizer
        tells by its state.
        """
        shift = getattr(layer, "bias", None)
        if shift is None:
            return self.optimizer_has_stepped
        with torch.no_grad():
            return (
                bool((shift != shift.flatten()[0]).any()) if shift.numel() > 1 else bool((shift != 0).any())
            )
