"""BN216, BN217: predictions that change with their batch mates, and batches that are no random samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.contents import shuffled
from batchnorm.doctor.data.noise import BatchStatistics
from batchnorm.doctor.data.observed import Observed
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.subject import Subject

_CHANGE = 1e-3
_SHUFFLES = 200
# Standard deviations of the shuffled values, whose distribution has a long tail and which every layer is
# compared with; and how many times the variance that chance gives.
_BEYOND, _TIMES = 8.0, 3.0


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
    """Predictions that change by `_CHANGE` std or more, and 3 times as much as when the batch is run again.

    In eval mode, RMS over the same samples, with the other half of the batch exchanged (or left out, where no
    other batch fits). An error; a warning where the layer at which it starts keeps no running statistics.
    """
    observed: Observed = subject.observed
    if observed.mates is None:
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
    "running statistics follow the last ones.",
    fix="DataLoader(..., shuffle=True); shuffle before writing shards, and across sources.",
    needs_data=True,
)
def ordered_batches(check: Check, subject: Subject) -> Iterator[Finding]:
    """Batches that differ from each other by more than chance gives those of the same samples, shuffled.

    Of the first `shuffled(...)` batches, by a permutation test: the variance between batches is `_BEYOND`
    standard deviations above its mean over `_SHUFFLES` permutations, and more than `_TIMES` that mean. Of
    class shares, where all these batches have labels and not every one is different; if they show nothing,
    of what a layer is given in eval mode: the layer with the largest ratio, of those with a row per sample.
    One finding for the model: a warning for training data, else a note.
    """
    observed: Observed = subject.observed
    severity: Severity = "warning" if subject.trains else "note"
    batches = subject.contents[: shuffled(subject.contents)]
    classes = [batch.labels for batch in batches]
    known = [y for y in classes if y is not None]
    if len(known) == len(classes) and len(known) > 1:
        found = _between(_one_hot(known))
        if found is not None and _is_beyond(*found):
            yield _finding(check, "classes", severity, *found, classes=_per_batch(known))
            return
    # In eval mode a sample is not changed by its batch, so the samples of every layer can be shuffled: of
    # those with a row per sample. Tokens of one sample are alike, and always in one batch.
    worst = None
    for name, calls in observed.by_running.statistics.items():
        first = _first_calls(calls, observed.by_running.batch_of[name], len(batches))
        if any(len(rows) != batches[number].samples for number, rows in first.items()):
            continue
        found = _between(list(first.values()))
        if found is not None and _is_beyond(*found) and (worst is None or found[0] / found[1] > worst[1]):
            worst = name, found[0] / found[1], found
    if worst is not None:
        yield _finding(check, f"inputs of {worst[0]!r}", severity, *worst[2], seen_at=worst[0])


def _finding(
    check: Check,
    what: str,
    severity: Severity,
    effect: float,
    chance: float,
    spread: float,
    *,
    classes: float | None = None,
    seen_at: str | None = None,
) -> Finding:
    text = (
        f"{what} differ between batches {effect / chance:.3g} times as much as in shuffled "
        f"data ({(effect - chance) / spread:.0f} standard deviations beyond chance)"
    )
    if classes is not None:
        text += f"; a batch has {classes:.1f} classes on average"
    return check.finding(
        None,
        text,
        severity=severity,
        effect=effect / chance,
        noise_alone=1.0,
        standard_error=spread / chance,
        classes=classes,
        seen_at=seen_at,
    )


def _first_calls(calls: list[BatchStatistics], batch_of: list[int], batches: int) -> dict[int, Tensor]:
    """What each batch gave in its first call, in units that the channels share, by the batch's number."""
    first: dict[int, BatchStatistics] = {}
    for call, batch in zip(calls, batch_of, strict=True):
        if batch < batches:
            first.setdefault(batch, call)
    if not first:
        return {}
    scale = torch.stack([call.var for call in first.values()]).mean(0).clamp_min(1e-12).sqrt()
    return {number: call.pooled.double() / scale for number, call in first.items()}


def _between(batches: list[Tensor]) -> tuple[float, float, float] | None:
    """The variance of batches' means, and its mean and standard deviation when the samples are shuffled.

    A permutation test: whatever the correlations of channels are, the shuffled batches have them too. With
    the samples' products K, the squared length of a batch's mean is the mean of its block of K.
    """
    sizes = torch.tensor([len(batch) for batch in batches])
    if len(sizes) < 2 or int(sizes.min()) < 2 or int(sizes.sum()) < 8:
        return None
    samples = torch.cat(batches)
    samples = samples - samples.mean(0)
    samples = samples[:, torch.isfinite(samples).all(0)]
    products = samples @ samples.T
    generator = torch.Generator().manual_seed(0)
    means = nn.functional.one_hot(torch.repeat_interleave(torch.arange(len(sizes)), sizes)).T / sizes[:, None]
    orders = [torch.arange(len(samples))]
    orders += [torch.randperm(len(samples), generator=generator) for _ in range(_SHUFFLES)]
    weights = torch.cat([means[:, order] for order in orders]).double()
    spreads = ((weights @ products) * weights).sum(1).view(len(orders), -1).mean(1)
    return float(spreads[0]), float(spreads[1:].mean()), float(spreads[1:].std())


def _is_beyond(effect: float, chance: float, spread: float) -> bool:
    return chance > 0 and spread > 0 and effect - chance > _BEYOND * spread and effect > _TIMES * chance


def _one_hot(known: list[Tensor]) -> list[Tensor]:
    """A column per class that occurs; none where all labels differ: ids or times, which are no classes."""
    classes, place = torch.unique(torch.cat(known), return_inverse=True)
    if len(classes) == len(place):
        return []
    return list(nn.functional.one_hot(place).double().split([len(y) for y in known]))


def _per_batch(known: list[Tensor]) -> float:
    return math.fsum(len(y.unique()) for y in known) / len(known)
