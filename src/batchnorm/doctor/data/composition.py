"""BN216, BN217: predictions that change with their batch mates, and batches that are no random samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.data.layers import trains
from batchnorm.doctor.data.noise import BatchStatistics
from batchnorm.doctor.data.observe import Observed
from batchnorm.doctor.data.outputs import labels
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.subject import Subject

_CHANGE = 1e-3
_SHUFFLES = 200
# Standard deviations of the shuffled values; and how many times the variance that chance gives.
_BEYOND, _TIMES = 5.0, 2.0


@check(
    "BN216",
    "predictions change with their batch mates",
    severity="error",
    why="In eval mode a sample's prediction must be its own; here it depends on what else is in the batch.",
    fix="Keep running statistics (track_running_stats=True) and use them in eval mode; no reduction over "
    "the batch.",
    needs_data=True,
)
def changes_with_mates(check: Check, subject: Subject) -> Iterator[Finding]:
    observed: Observed | None = subject.observed
    if observed is None or observed.mates is None:
        return
    found = observed.mates
    if found.effect < _CHANGE or found.effect < 3 * found.again:
        return
    layer = observed.layers.get(found.layer or "")
    by_option = layer is not None and layer.running is None and isinstance(layer.module, nn.Module)
    yield check.finding(
        found.layer or None,
        f"in eval mode predictions change by {found.effect:.2g} std when half of the batch is exchanged "
        f"({found.again:.1g} when it is run again)"
        + ("; the layer keeps no running statistics" if by_option else ""),
        severity="warning" if by_option else "error",
        effect=found.effect,
        standard_error=found.error,
        noise_alone=found.again,
        samples=found.samples,
    )


@check(
    "BN217",
    "batches are not random samples",
    severity="warning",
    why="Batches sorted by class or source have statistics of their own: training normalises by them, and "
    "running "
    "statistics follow the last ones.",
    fix="DataLoader(..., shuffle=True); shuffle before writing shards, and across sources.",
    needs_data=True,
)
def ordered_batches(check: Check, subject: Subject) -> Iterator[Finding]:
    observed: Observed | None = subject.observed
    if observed is None:
        return
    severity: Severity = "warning" if trains(subject) else "note"
    classes = [labels(batch) for batch in subject.batches]
    known = [y for y in classes if y is not None]
    if len(known) == len(classes) and len(known) > 1:
        groups = [
            nn.functional.one_hot(y - min(int(z.min()) for z in known), _classes(known)).double()
            for y in known
        ]
        found = _between(groups)
        if found is not None and _is_beyond(*found):
            yield _finding(check, None, "classes", severity, *found, classes=_per_batch(known))
            return
    first = next(iter(observed.by_batch.statistics), None)
    if first is None:
        return
    found = _between([_standardized(call) for call in observed.by_batch.statistics[first]])
    if found is not None and _is_beyond(*found):
        yield _finding(check, first, "images", severity, *found)


def _finding(
    check: Check,
    layer: str | None,
    what: str,
    severity: Severity,
    effect: float,
    chance: float,
    spread: float,
    classes: float | None = None,
) -> Finding:
    text = (
        f"the {what} of batches differ {effect / chance:.3g} times as much as random batches' would "
        f"({(effect - chance) / spread:.0f} standard deviations of shuffled ones)"
    )
    if classes is not None:
        text += f"; a batch has {classes:.1f} classes on average"
    return check.finding(
        layer,
        text,
        severity=severity,
        effect=effect,
        noise_alone=chance,
        standard_error=spread,
        classes=classes,
    )


def _between(batches: list[Tensor]) -> tuple[float, float, float] | None:
    """The variance of batches' means, and its mean and standard deviation when the samples are shuffled.

    A permutation test: whatever the correlations of channels are, the shuffled batches have them too.
    """
    sizes = [len(batch) for batch in batches]
    if len(sizes) < 2 or min(sizes) < 2 or sum(sizes) < 8:
        return None
    samples = torch.cat(batches).double()
    samples = samples[:, torch.isfinite(samples).all(0)]
    if samples.shape[1] == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    batch_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    weights = nn.functional.one_hot(batch_of).T.double() / torch.tensor(sizes)[:, None]

    def spread(order: Tensor) -> float:
        means = weights @ samples[order]
        return float((means - samples.mean(0)).square().sum(1).mean())

    effect = spread(torch.arange(len(samples)))
    shuffled = torch.tensor(
        [spread(torch.randperm(len(samples), generator=generator)) for _ in range(_SHUFFLES)]
    ).double()
    return effect, float(shuffled.mean()), float(shuffled.std())


def _is_beyond(effect: float, chance: float, spread: float) -> bool:
    return spread > 0 and effect - chance > _BEYOND * spread and effect > _TIMES * chance


def _standardized(call: BatchStatistics) -> Tensor:
    return call.pooled.double() / call.var.clamp_min(1e-12).sqrt().median().clamp_min(1e-12)


def _classes(known: list[Tensor]) -> int:
    return max(int(y.max()) for y in known) - min(int(y.min()) for y in known) + 1


def _per_batch(known: list[Tensor]) -> float:
    return math.fsum(len(y.unique()) for y in known) / len(known)
