"""What recalibrate changed, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.batch_norms import Filter, check_model, has_statistics
from batchnorm.model.freeze import is_frozen
from batchnorm.model.frozen import frozen_batch_norms
from batchnorm.model.gather import Normalises, Seen
from batchnorm.names import quoted


@dataclass(frozen=True)
class Change:
    """How far the running statistics of a layer were from those of the data.

    Args:
        layer: class and qualified name.
        batches: how many are in the new statistics.
        values: how many of them per channel, weights of masks counted.
        mean_shift: root mean square over the channels of `(new mean - old mean) / sqrt(new variance + eps)`.
        variance_factor: exp of the root mean square of `log((new variance + eps) / (old variance + eps))`: 1
            where nothing changed, 2 for variances twice or half as large; inf where one was no variance.
    """

    layer: str
    batches: int
    values: float
    mean_shift: float
    variance_factor: float

    @classmethod
    def of(cls, described: str, layer: Normalises, seen: Seen, old_mean: Tensor, old_var: Tensor) -> Change:
        """What became of a layer that had these statistics."""
        mean, var = (tensor.detach().double() for tensor in statistics_of(layer))
        eps = getattr(layer, "eps", 1e-5)
        shift = (mean - old_mean.double()) / (var + eps).sqrt()
        ratio = torch.log((var + eps) / (old_var.double() + eps))
        return cls(
            described,
            seen.times,
            float(seen.moments.count.max()),
            _rms(shift),
            math.exp(min(_rms(ratio), 700.0)) if bool(ratio.isfinite().all()) else math.inf,
        )

    def __str__(self) -> str:
        return (
            f"{self.layer}: mean by {self.mean_shift:.2g} std, variance by a factor "
            f"{self.variance_factor:.3g} ({self.values:,.0f} values per channel in {self.batches} batches)"
        )


@dataclass(frozen=True)
class NotRecalibrated:
    """A batch norm whose statistics stayed, and why."""

    layer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason}"


@dataclass(frozen=True)
class RecalibrationReport:
    """What `recalibrate` changed, in order of execution, and what it left; `print` it."""

    changed: tuple[Change, ...]
    left: tuple[NotRecalibrated, ...]

    def __str__(self) -> str:
        lines = []
        for title, entries in (("recalibrated", self.changed), ("left as they are", self.left)):
            if entries:
                lines.append(f"{title} ({len(entries)})")
                lines.extend(f"  {entry}" for entry in entries)
        return "\n".join(lines)


_reports: WeakKeyDictionary[nn.Module, RecalibrationReport] = WeakKeyDictionary()


def recalibration_report(model: nn.Module) -> RecalibrationReport:
    """What the last `recalibrate(model, ...)` in this process changed; `print` it.

    Args:
        model: the one that was recalibrated, not a copy.

    Returns:
        for each layer how far its running statistics were from those of the data, and what was left and why.

    Raises:
        TypeError: not an nn.Module.
        ValueError: this model has not been recalibrated in this process.
    """
    check_model(model, "recalibration_report")
    if model not in _reports:
        raise ValueError(
            f"recalibration_report: this {type(model).__name__} has not been recalibrated in this process: "
            "bn.recalibrate(model, loader) first"
        )
    return _reports[model]


def keep_report(model: nn.Module, changes: list[Change], filter: Filter | None) -> None:
    """Remember what recalibrate did to a model, as long as it lives."""
    changed = {change.layer for change in changes}
    left = []
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and quoted(layer, name) not in changed:
            left.append(NotRecalibrated(quoted(layer, name), _why_left(name, layer, filter)))
    for name, layer in frozen_batch_norms(model).items():
        left.append(NotRecalibrated(quoted(layer, name), "it is frozen for good: it normalises by constants"))
    _reports[model] = RecalibrationReport(tuple(changes), tuple(left))


def statistics_of(layer: Normalises) -> tuple[Tensor, Tensor]:
    """The running mean and variance themselves."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _why_left(name: str, layer: _BatchNorm, filter: Filter | None) -> str:
    if not has_statistics(layer):
        return "it has no running statistics"
    if is_frozen(layer):
        return "it is frozen (bn.freeze)"
    if filter is not None and not filter(name, layer):
        return "the filter leaves it"
    return "no data reached it"


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
