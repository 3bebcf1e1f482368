"""BN203 to BN206: too few values per channel; channels that are constant, dead, or dominated by eps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.data.noise import BatchStatistics, Population, mean_and_error
from batchnorm.doctor.data.observed import Observed
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.subject import Subject

# Fewer independent values put the batch's mean off by half a standard deviation or more; a quarter.
_TOO_FEW, _FEW = 4.0, 16.0
_SHARE_OF_CHANNELS = 0.05
_SHARE_DEAD = 0.25
# Standardised data have a spread of 1, images of 0 to 1 one of 0.3.
_SMALL_DATA = 0.05
# With this many images without one that fires, the rate is below 5% with 95% confidence (rule of three).
_IMAGES_FOR_DEAD = 60


@check(
    "BN203",
    "too few values per channel",
    severity="warning",
    why="Each batch is normalised by statistics that are mostly noise, and the running ones average that "
    "noise.",
    fix="Larger batches, sync=True over processes, drop_last=True for a small last batch; or bn.freeze in "
    "fine-tuning, or group norm.",
    needs_data=True,
)
def too_few_values(check: Check, subject: Subject) -> Iterator[Finding]:
    """Below `_FEW` independent values per channel in a layer's smallest call; layers that are frozen aside.

    They are `min(values, max(1, images / r))`, for r the variance of an image's mean by that of the values
    (`_noise`), with the values and images of all processes that the layer normalises over. A note; for
    training data, below `_TOO_FEW`, a warning, and with 2 values or fewer an error. The noise of the mean, in
    standard deviations, is `1 / sqrt(independent values)`.
    """
    observed: Observed = subject.observed
    for name, calls in observed.by_batch.statistics.items():
        if observed.layers[name].frozen:
            continue
        batch_of = observed.by_batch.batch_of[name]
        smallest, number = min(zip(calls, batch_of, strict=True), key=lambda numbered: numbered[0].values)
        has_tokens = any(
            call.images != subject.contents[batch].samples
            for call, batch in zip(calls, batch_of, strict=True)
        )
        share, error = _noise(calls, observed.populations[name], has_tokens)
        per_image = 1 / share if share > 0 else math.inf
        processes = _normalised_together(observed, name)
        values, images = smallest.values * processes, smallest.images * processes
        effective = min(values, max(1.0, images * per_image))
        if effective >= _FEW:
            continue
        noise = 1 / math.sqrt(effective)
        severity: Severity = "note"
        if subject.trains and effective < _TOO_FEW:
            severity = "error" if values <= 2 else "warning"
        whose = f"a batch of {images}" if processes == 1 else f"a batch of {images} in {processes} processes"
        what = (
            f"{whose} has {values:.0f} values per channel, worth {effective:.1f} independent ones: its mean "
            f"is off by {noise:.0%} of a standard deviation"
        )
        if values <= 2:
            what += "; two values are normalised to -1 and 1 whatever they are"
        yield check.finding(
            name,
            what,
            severity=severity,
            effect=noise,
            standard_error=noise * error / (2 * share) if share > 0 else 0.0,
            noise_alone=1 / math.sqrt(max(values, 1.0)),
            values=values,
            independent_values=effective,
            images=images,
            **subject.named(number)[1],
        )


def _normalised_together(observed: Observed, name: str) -> int:
    """How many processes the layer normalises over in training, of those that are looked at."""
    if observed.processes is None:
        return 1
    return min(observed.layers[name].processes, len(observed.processes.ranks))


def _noise(calls: list[BatchStatistics], seen: Population, has_tokens: bool) -> tuple[float, float]:
    """The variance of a mean of one image by that of the values, over the channels; its standard error.

    Between images it is unbiased also where a batch has two; where a batch has one, between batches. So too
    where an image is several rows (tokens, one by one): they are no more independent than its pixels.
    """
    varies = ~constant(seen)
    if not bool(varies.any()):
        return 0.0, 0.0
    several = [call for call in calls if call.images > 1]
    if several and not (has_tokens and seen.batches > 1):
        shares = [float((call.mean_noise * call.images / seen.var)[varies].mean()) for call in several]
    else:
        rows = math.fsum(call.images for call in calls) / len(calls)
        shares = [rows * float((seen.mean_noise / seen.var)[varies].mean())]
    share, error = mean_and_error(shares)
    return share, 0.0 if math.isnan(error) else error


def constant(seen: Population) -> Tensor:
    """The channels whose values differ by no more than float32's rounding, (C,)."""
    return seen.var <= (1e-6 * seen.mean.abs()).square() + 1e-30


@check(
    "BN204",
    "constant channels",
    severity="warning",
    why="A channel without variance is divided by sqrt(eps): it carries nothing, and noise is multiplied "
    "by 300.",
    fix="Look for dead filters, zeroed inputs or a bias alone before the layer; prune the channels or "
    "initialise them again.",
    needs_data=True,
)
def constant_channels(check: Check, subject: Subject) -> Iterator[Finding]:
    """Channels that are `constant` over all batches, in layers that were given more than 2 values of each.

    A warning from a share of `_SHARE_OF_CHANNELS` of the layer's channels on, else a note.
    """
    observed: Observed = subject.observed
    for name, seen in observed.populations.items():
        bad = constant(seen)
        if bool(bad.any()) and sum(call.values for call in observed.by_batch.statistics[name]) > 2:
            share = float(bad.double().mean())
            yield check.finding(
                name,
                f"{int(bad.sum())} of {len(bad)} channels have the same value everywhere ({_listed(bad)})",
                severity=_by_share(share),
                effect=share,
                standard_error=0.0,
                noise_alone=0.0,
                channels=int(bad.sum()),
            )


@check(
    "BN205",
    "channels dead after the activation",
    severity="warning",
    why="A ReLU that never lets a channel through gives no gradient either: the channel does not come back.",
    fix="Lower the learning rate, start again from before the channels died, or set their bias to 0.",
    needs_data=True,
)
def dead_channels(check: Check, subject: Subject) -> Iterator[Finding]:
    """Channels that a ReLU never lets through: no output above 0 in any image, by batch statistics.

    Channels that are `constant` are BN204's. A warning where they are `_SHARE_DEAD` or more of the layer's
    channels and there are `_IMAGES_FOR_DEAD` images or more, else a note.
    """
    observed: Observed = subject.observed
    for name in observed.by_batch.statistics:
        if name not in observed.rectified or name not in observed.largest:
            continue
        # A constant channel is the finding of BN204.
        dead = (observed.largest[name] <= 0) & ~constant(observed.populations[name])
        if not bool(dead.any()):
            continue
        images = sum(call.images for call in observed.by_batch.statistics[name])
        share = float(dead.double().mean())
        grave = share >= _SHARE_DEAD and images >= _IMAGES_FOR_DEAD
        yield check.finding(
            name,
            f"{int(dead.sum())} of {len(dead)} channels are zero after the ReLU in all of {images} images "
            f"({_listed(dead)})",
            severity="warning" if grave else "note",
            effect=share,
            standard_error=0.0,
            noise_alone=3 / images,  # the firing rate that so many silent images do not exclude
            channels=int(dead.sum()),
            images=images,
        )


@check(
    "BN206",
    "variance below eps",
    severity="warning",
    why="Where eps is larger than the variance, the layer does not normalise: its output is shrunk.",
    fix="Scale the inputs (standardise the data, larger initial weights), or lower eps.",
    needs_data=True,
)
def dominated_by_eps(check: Check, subject: Subject) -> Iterator[Finding]:
    """Channels that vary, with `var + 3 * sqrt(var_noise / batches) < eps` over all batches.

    A warning from a share of `_SHARE_OF_CHANNELS` of the layer's channels on, else a note. A note in a layer
    that has counted no batch yet, unless the data are small: training changes what initialisation makes so.
    """
    observed: Observed = subject.observed
    spreads = [batch.spread for batch in subject.contents if batch.spread is not None]
    are_small = bool(spreads) and max(spreads) < _SMALL_DATA
    for name, seen in observed.populations.items():
        eps = observed.layers[name].eps
        error = (seen.var_noise / seen.batches).sqrt()
        bad = (seen.var + 3 * error < eps) & ~constant(seen)
        if not bool(bad.any()):
            continue
        std = (seen.var / (seen.var + eps)).sqrt()
        slope = (0.5 * error / (seen.var + eps) / std.clamp_min(1e-12))[bad].mean()
        share = float(bad.double().mean())
        yield check.finding(
            name,
            f"{int(bad.sum())} of {len(bad)} channels have a variance below eps={eps:g} (median "
            f"{float(seen.var[bad].median()):.1e}): they are normalised to a std of "
            f"{float(std[bad].mean()):.2g}, not 1",
            severity="note" if name in observed.never_moved and not are_small else _by_share(share),
            effect=float(std[bad].mean()),
            standard_error=float(slope),
            noise_alone=1.0,
            channels=int(bad.sum()),
            eps=eps,
        )


def _by_share(share: float) -> Severity:
    return "warning" if share >= _SHARE_OF_CHANNELS else "note"


def _listed(channels: Tensor) -> str:
    numbers = torch.nonzero(channels).flatten().tolist()
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
