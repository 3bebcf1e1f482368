"""What is examined: the model, its batch norms, what trains it, and what was observed on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from batchnorm.doctor.contents import Contents, in_order
from batchnorm.doctor.handwritten import Handwritten, handwritten
from batchnorm.doctor.structure import Call, calls_of
from batchnorm.model.packing import comes_back
from batchnorm.model.ranks import ALONE, Ranks

# From so many on it can be told whether shifts are draws from one distribution.
_MANY_LAYERS, _MANY_CHANNELS = 8, 500


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
        order: of each of them, the place of its rank and its number there.
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
    order: list[tuple[int, int]] = field(default_factory=list)
    observed: Any = None

    def __post_init__(self) -> None:
        if not self.contents:
            self.contents = [Contents.of(batch) for batch in self.batches]
            self.order = in_order([self.contents])

    @classmethod
    def of(cls, model: nn.Module, **attributes: Any) -> Subject:
        """The model with the batch norms that it has now."""
        found = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
        return cls(model, found, **attributes)

    def again(self) -> Subject:
        """The same to be examined anew, after the model has changed."""
        kept = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return Subject.of(**{name: kept[name] for name in kept if name not in ("batch_norms", "observed")})

    @property
    def numbers(self) -> list[int]:
        """Of this process's batches, among those of all."""
        return [number for number, (place, _) in enumerate(self.order) if place == self.ranks.place]

    def batch_of_all(self, number: int) -> tuple[int, Any] | None:
        """The batch of that number, of whichever process, in every one; all call this alike.

        What cannot be sent (an object of some class) stays where it is: then it is `own_batch`.
        """
        place, own = self.order[number]
        if self.ranks.alone:
            return number, self.batches[own]

        def sent() -> Any:
            return self.batches[own] if comes_back(self.batches[own]) else None

        batch = self.ranks.from_one(place, sent)
        return self.own_batch(number) if batch is None else (number, batch)

    def own_batch(self, number: int) -> tuple[int, Any] | None:
        """Of this process's own, from the first on again where it has fewer; None where it has none.

        With its number among all.
        """
        if not self.batches:
            return None
        own = number % len(self.batches)
        return self.numbers[own], self.batches[own]

    def named(self, number: int) -> tuple[str, dict[str, Any]]:
        """A batch in words, as in `batch 2 of rank 1`, and as evidence: its number among all, whose it is."""
        if self.ranks.alone:
            return f"batch {number + 1}", {"batch": number + 1}
        place, own = self.order[number]
        rank = self.ranks.names[place]
        return f"batch {own + 1} of rank {rank}", {
            "batch": number + 1,
            "rank": rank,
            "batch_of_rank": own + 1,
        }

    @property
    def trains(self) -> bool:
        """Whether the batches are taken for the training data: an optimizer, or a model in training mode."""
        return self.optimizer is not None or self.model.training

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

    @cached_property
    def shifts_are_drawn(self) -> bool:
        """Whether the shifts of all layers look like draws from one distribution, as some are initialised.

        Training gives each layer a mean and a spread of its own. They agree here, in many layers of many
        channels, within 5 standard errors.
        """
        shifts = [getattr(layer, "bias", None) for layer in self.batch_norms.values()]
        known = [s.detach().double().flatten() for s in shifts if s is not None and s.numel() > 1]
        total = sum(len(shift) for shift in known)
        if len(known) < _MANY_LAYERS or total < _MANY_CHANNELS:
            return False
        every = torch.cat(known)
        mean, std = every.mean(), every.std()
        return all(
            abs(float((s.mean() - mean) / std)) * len(s) ** 0.5 < 5
            and abs(math.log(max(float(s.std() / std), 1e-12))) * (2 * len(s)) ** 0.5 < 5
            for s in known
        )

    def is_trained(self, layer: nn.Module) -> bool:
        """Whether the layer's weights are not its first ones: its shifts differ from channel to channel.

        Scales may be drawn at random from the start (DCGAN), shifts are only where those of all layers look
        so (RepVGG). Without shifts, the optimizer tells by its state.
        """
        if self.shifts_are_drawn and not self.optimizer_has_stepped:
            return False
        shift = getattr(layer, "bias", None)
        if shift is None:
            return self.optimizer_has_stepped
        with torch.no_grad():
            return (
                bool((shift != shift.flatten()[0]).any()) if shift.numel() > 1 else bool((shift != 0).any())
            )
