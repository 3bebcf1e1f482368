"""Numbers that a batch norm was built with: momentum and eps."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject
from batchnorm.model.batch_norms import batches_counted
from batchnorm.model.freeze import is_frozen

HIGH_MOMENTUM, LOW_MOMENTUM = 0.5, 0.001
LARGE_EPS = 1e-2
# Below it, a channel that is constant up to rounding is scaled up by more than 1e5.
SMALL_EPS = 1e-10
# The share of the first statistics that may be left in a running average without harm.
_SHARE = 0.01
_SEVERAL = 3


@check(
    "BN106",
    "momentum of the other convention",
    severity="warning",
    why="torch's momentum is the weight of the new batch, other frameworks' that of the past: 0.9 here "
    "means statistics of the last batch or two, and 0.001 ones that take thousands of steps to "
    "arrive.",
    fix="Use 1 - momentum (0.1 for 0.9, 0.01 for 0.99); report.fix('BN106') does, then recalibrate.",
    needs_data=False,
)
def momentum(check: Check, subject: Subject) -> Iterator[Finding]:
    """Momentum, the weight of the new batch, of `HIGH_MOMENTUM` or more: a warning. Outside 0 to 1: an error.

    Of `LOW_MOMENTUM` or less: a warning, or a note where less than `_SHARE` of the first statistics is left,
    `(1 - momentum)**batches`, and where `_SEVERAL` layers or more, all of a new model, share it. Not of
    layers that `bn.freeze` has frozen or that keep no running statistics; of hand-written ones the momentum
    that was measured, where it is high.
    """
    for name, seen in subject.handwritten.items():
        weight = max(kept.momentum for kept in seen.kept)
        if weight >= HIGH_MOMENTUM:
            yield check.finding(name, _window(weight), momentum=weight, batches=_batches(weight))
    for name, layer in subject.batch_norms.items():
        value = getattr(layer, "momentum", None)
        if value is None or getattr(layer, "running_mean", None) is None or is_frozen(layer):
            continue
        if not 0 <= value <= 1:
            yield check.finding(
                name, f"momentum {value:g} is no weight between 0 and 1", severity="error", momentum=value
            )
        elif value >= HIGH_MOMENTUM:
            yield check.finding(name, _window(value), momentum=value, batches=_batches(value))
        elif value <= LOW_MOMENTUM:
            seen_batches = batches_counted(layer) or 0
            left = (1 - value) ** seen_batches
            yield check.finding(
                name,
                f"momentum {value:g}: {left:.1%} of its first statistics are left ({seen_batches} batches)",
                severity="note" if left < _SHARE or _is_chosen(subject, value) else "warning",
                momentum=value,
                batches_seen=seen_batches,
                share_left=left,
            )


def _is_chosen(subject: Subject, momentum: float) -> bool:
    """Whether all batch norms of a model that is not trained yet share a momentum, as in MNASNet.

    Nothing is wrong there so far, and one layer's slip it is not.
    """
    layers = list(subject.batch_norms.values())
    return len(layers) >= _SEVERAL and all(
        getattr(layer, "momentum", None) == momentum and not batches_counted(layer) for layer in layers
    )


def _window(momentum: float) -> str:
    return (
        f"momentum {momentum:.6g} weighs the new batch: the running statistics are those of the last "
        f"{_batches(momentum):.1f} batches"
    )


def _batches(momentum: float) -> float:
    """How many batches the average is worth: 1 / sum of squared weights."""
    return (2 - momentum) / momentum


@check(
    "BN107",
    "eps too large or too small",
    severity="warning",
    why="A large eps shrinks channels of small variance instead of normalising them; one too small for "
    "the dtype blows up a channel that is constant but for rounding.",
    fix="Use 1e-5 (torch) or 1e-3 (Keras), and train or fine-tune with it: changed afterwards, it changes"
    " the outputs.",
    needs_data=False,
)
def eps(check: Check, subject: Subject) -> Iterator[Finding]:
    """An eps of 0 or less: an error. Below `SMALL_EPS`, or `LARGE_EPS` and more: a warning.

    A large one is a note where its share `eps / (v + eps)`, for v the median running variance, is below
    `_SHARE`; that is known once batches were counted.
    """
    for name, layer in subject.batch_norms.items():
        value = float(layer.eps)
        if value <= 0:
            yield check.finding(
                name,
                f"eps {value:g}: a channel that is constant in a batch becomes NaN",
                severity="error",
                eps=value,
            )
        elif value < SMALL_EPS:
            yield check.finding(
                name,
                f"eps {value:g}: a constant channel's rounding errors grow {value**-0.5:.1g} fold",
                eps=value,
            )
        elif value >= LARGE_EPS:
            share = _share_of_eps(layer, value)
            scaled = "" if share is None else f", {share:.0%} of the median running variance with it"
            yield check.finding(
                name,
                f"eps {value:g} is large{scaled}",
                severity="note" if share is not None and share < _SHARE else "warning",
                eps=value,
                share_of_variance=share,
            )


def _share_of_eps(layer: _BatchNorm, eps: float) -> float | None:
    variance = layer.running_var
    if variance is None or not batches_counted(layer):
        return None
    return eps / (float(variance.float().median()) + eps)
