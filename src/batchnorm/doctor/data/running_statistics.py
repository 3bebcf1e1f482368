"""BN202, BN215: running against population statistics, and data that are not the training's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.data.gap import output_gap, scores_of
from batchnorm.doctor.data.layers import Layer
from batchnorm.doctor.data.noise import Population, largest_by_chance, rms
from batchnorm.doctor.data.observed import Observed
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.subject import Subject
from batchnorm.model.batch_norms import batches_counted

# In standard deviations, and in logarithms of a ratio: over all channels of a layer, and of one channel.
MEAN_SHIFT, ONE_MEAN_SHIFT = 0.3, 1.5
LOG_RATIO, ONE_LOG_RATIO = math.log(2), math.log(6)
# Of the first statistics, a share that is worth a word.
_MANY_LEFT = 0.05


@dataclass(frozen=True)
class Mismatch:
    """How far a layer's running statistics are from the population's, and how far chance would take them.

    Root mean squares over the channels: `mean_shift` in standard deviations of the population, `log_ratio`
    the logarithm of running by population variance (eps added to both); `..._by_chance` what the noise of a
    finite population and of the exponential average gives. `worst` is the channel that is furthest, with its
    shift and ratio.
    """

    mean_shift: float
    mean_by_chance: float
    log_ratio: float
    log_by_chance: float
    worst: int
    worst_shift: float
    worst_ratio: float
    grave: bool
    significant: bool


def mismatch(layer: Layer, seen: Population) -> Mismatch | None:
    """Compare; None where the layer has no running statistics or they are not finite."""
    if layer.statistics is None:
        return None
    mean, var = layer.statistics
    scale, share = seen.var + layer.eps, 1 / seen.batches + 1 / layer.batches_averaged
    shift = (mean - seen.mean) / scale.sqrt()
    noise = (seen.mean_noise * share / scale).sqrt()
    # A running variance tends to the mean of the batches' variances; recalibration gives the population's.
    # Neither is a fault.
    ratio = _nearer_zero(
        *(torch.log((var + layer.eps) / (v + layer.eps)) for v in (seen.var, seen.batch_var))
    )
    ratio_noise = (seen.var_noise * share).sqrt() / scale
    if not bool(torch.isfinite(shift).all() and torch.isfinite(ratio).all()):
        return None
    limit = largest_by_chance(2 * len(shift))
    z = torch.maximum((shift / noise.clamp_min(1e-9)).abs(), (ratio / ratio_noise.clamp_min(1e-9)).abs())
    worst = int((shift.abs() / ONE_MEAN_SHIFT + ratio.abs() / ONE_LOG_RATIO).argmax())
    one_is_far = (shift.abs() > ONE_MEAN_SHIFT) & (shift.abs() > limit * noise)
    one_is_far |= (ratio.abs() > ONE_LOG_RATIO) & (ratio.abs() > limit * ratio_noise)
    effect = (rms(shift), rms(noise), rms(ratio), rms(ratio_noise))
    all_are_far = _beyond(*effect[:2], MEAN_SHIFT) or _beyond(*effect[2:], LOG_RATIO)
    return Mismatch(
        *effect,
        worst,
        float(shift[worst]),
        float(ratio[worst].exp()),
        all_are_far or bool(one_is_far.any()),
        bool((z > limit).any()),
    )


def _nearer_zero(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a.abs() < b.abs(), a, b)


def _beyond(effect: float, by_chance: float, threshold: float) -> bool:
    return math.sqrt(max(0.0, effect**2 - by_chance**2)) > threshold and effect > 3 * by_chance


def _first_values_left(layer: Layer) -> float:
    """The share of the values before the first batch in an exponential average: (1 - momentum)^batches."""
    counted = batches_counted(layer.module)
    momentum = getattr(layer.module, "momentum", None)
    if layer.handmade or counted is None or momentum is None:
        return 0.0
    return float((1 - momentum) ** counted)


def _mismatches(observed: Observed) -> dict[str, Mismatch]:
    found = {}
    for name, seen in observed.populations.items():
        if name not in observed.never_moved:
            one = mismatch(observed.layers[name], seen)
            if one is not None:
                found[name] = one
    return found


def _domain(subject: Subject, found: dict[str, Mismatch]) -> str | None:
    """The first layer, where the data and not the training are at fault: it is furthest from the weights."""
    first = next(iter(found), None)
    if first is None or subject.trains or not found[first].grave:
        return None
    return None if subject.observed.layers[first].frozen else first


@check(
    "BN202",
    "running statistics are not the population's",
    severity="warning",
    why="Eval mode normalises by them, so the model that is evaluated is not the one that was trained.",
    fix="bn.recalibrate(model, training_loader); if it comes back, train longer after the last large "
    "step, or lower momentum.",
    needs_data=True,
)
def running_against_population(check: Check, subject: Subject) -> Iterator[Finding]:
    """A `mismatch` that is grave: a warning; in a frozen layer, a note.

    One that is significant and not grave, with an RMS of 0.1 or more in shift or log ratio, is a note. Not of
    layers that were never moved, and of none where BN215 takes it for a shift of the data.
    """
    observed: Observed = subject.observed
    found = _mismatches(observed)
    domain = _domain(subject, found)
    for name, one in found.items():
        if not (one.grave or one.significant) or domain is not None:
            continue
        severity: Severity = "warning" if one.grave and not observed.layers[name].frozen else "note"
        if not one.grave and max(one.mean_shift, one.log_ratio) < 0.1:
            continue
        what = (
            f"running statistics are off by {one.mean_shift:.2g} std in the mean (chance "
            f"{one.mean_by_chance:.2g}) and a factor {math.exp(one.log_ratio):.3g} in the variance (chance "
            f"{math.exp(one.log_by_chance):.3g}); channel {one.worst}: {one.worst_shift:+.2g} std, factor "
            f"{one.worst_ratio:.2g}"
        )
        left = _first_values_left(observed.layers[name])
        if left > _MANY_LEFT:
            what += f"; {left:.0%} of its statistics are still the first ones: it has seen few batches"
        yield check.finding(name, what, severity=severity, **_evidence(one), **closed(observed))


@check(
    "BN215",
    "the data differ from what the running statistics were taken from",
    severity="warning",
    why="Test data with other statistics (contrast, sensor, preprocessing) are normalised by the wrong ones.",
    fix="Check the preprocessing against that of training. If the shift is real, adapt: "
    "bn.recalibrate(model, loader_of_the_new_data). If these are the training data, the running "
    "statistics are stale: the same call.",
    needs_data=True,
)
def domain_shift(check: Check, subject: Subject) -> Iterator[Finding]:
    """A warning in place of BN202's where the first layer's `mismatch` is grave, on data that do not train.

    The first that has running statistics and has moved them; not where that layer is frozen. With the output
    gap and the scores before and after recalibration, as measured.
    """
    observed: Observed = subject.observed
    found = _mismatches(observed)
    first = _domain(subject, found)
    if first is None:
        return
    one = found[first]
    evidence = closed(observed)
    gains = [
        f"{name} {evidence[f'{name}_running']:.3g} -> {evidence[f'{name}_recalibrated']:.3g}"
        for name in ("accuracy", "loss", "entropy")
        if f"{name}_recalibrated" in evidence
    ]
    what = (
        f"from the first batch norm on the data differ from the training statistics: {one.mean_shift:.2g} "
        f"std in the mean (chance {one.mean_by_chance:.2g}), a factor {math.exp(one.log_ratio):.2g} in the "
        "variance"
    )
    if gains:
        what += f"; adapting the statistics gives {', '.join(gains)}"
    layers = sum(other.grave for other in found.values())
    yield check.finding(first, what, layers=layers, **_evidence(one), **evidence)


def _evidence(one: Mismatch) -> dict[str, Any]:
    return {
        "effect": one.mean_shift,
        "noise_alone": one.mean_by_chance,
        "standard_error": one.mean_by_chance,
        "variance_ratio": math.exp(one.log_ratio),
        "variance_ratio_by_chance": math.exp(one.log_by_chance),
        "worst_channel": one.worst,
        "worst_mean_shift": one.worst_shift,
        "worst_variance_ratio": one.worst_ratio,
    }


def closed(observed: Observed) -> dict[str, Any]:
    """What recalibration on these batches does to the output gap and the scores, as measured."""
    if observed.recalibrated is None or observed.of_recalibrated is None:
        return {}
    before, after = output_gap(observed.of_running), output_gap(observed.of_recalibrated)
    evidence: dict[str, Any] = {}
    if before is not None and after is not None:
        evidence |= {"output_gap": before[0], "output_gap_recalibrated": after[0]}
    old, new = scores_of(observed.by_running), scores_of(observed.recalibrated)
    for name in old.keys() & new.keys():
        evidence |= {f"{name}_running": old[name], f"{name}_recalibrated": new[name]}
    return evidence
