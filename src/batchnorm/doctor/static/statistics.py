"""Running statistics as they lie in the buffers: never updated, not finite, negative or zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject
from batchnorm.model.batch_norms import batches_counted
from batchnorm.model.freeze import is_frozen


@check(
    "BN108",
    "statistics never updated",
    severity="error",
    why="Eval mode normalises by mean 0 and variance 1, which are not this layer's: predictions are far "
    "from those of training.",
    fix="bn.recalibrate(model, loader), or report.fix('BN108') with a loader. Look for why: momentum=0, "
    "weights loaded without their buffers, a layer never called in training mode.",
    needs_data=False,
)
def never_updated(check: Check, subject: Subject) -> Iterator[Finding]:
    """Running mean 0 and variance 1 in every channel: an error in a layer that is trained.

    A note where `bn.freeze` has frozen it, and for one that is not trained in a model where another is.
    """
    others_trained = any(subject.is_trained(layer) for layer in subject.batch_norms.values())
    for name, layer in _with_statistics(subject):
        if not _as_new(layer):
            continue
        trained = subject.is_trained(layer)
        if trained:
            yield check.finding(
                name,
                "running mean 0 and variance 1 in every channel, as when new, but its weights are trained",
                severity="note" if is_frozen(layer) else "error",
                num_batches_tracked=batches_counted(layer),
                channels=layer.num_features,
            )
        elif others_trained:
            yield check.finding(
                name,
                "statistics and weights as when new in a trained model: is the layer used in training?",
                severity="note",
                num_batches_tracked=batches_counted(layer),
                channels=layer.num_features,
            )


@check(
    "BN109",
    "running statistics that cannot be",
    severity="error",
    why="Eval mode divides by the root of the running variance: NaN, inf and negative values spread to "
    "every output, and a variance of zero scales its channel up by 1/sqrt(eps).",
    fix="Find the batch that did it (non-finite inputs or a loss that diverged), then "
    "bn.recalibrate(model, loader); report.fix('BN109') does with a loader.",
    needs_data=False,
)
def impossible(check: Check, subject: Subject) -> Iterator[Finding]:
    """Per layer, running statistics that are NaN or inf: an error; a running variance below 0: an error.

    A running variance of 0: a warning, or a note where gamma is 0 in all those channels. Of a hand-written
    layer, a running variance of 0 in every channel: a warning.
    """
    for name, layer in _with_statistics(subject):
        mean, variance = _float(layer.running_mean), _float(layer.running_var)
        yield from _bad(check, name, mean, variance, layer)
    for name, seen in subject.handwritten.items():
        module = subject.model.get_submodule(name)
        for kept in seen.kept:
            value = _float(getattr(module, kept.name))
            if kept.statistic == "variance" and bool((value == 0).all()):
                yield check.finding(
                    name,
                    f"{kept.name} is 0 in all {value.numel()} channels: eval mode divides by sqrt(eps)",
                    severity="warning",
                    zero=value.numel(),
                    channels=value.numel(),
                )


def _bad(check: Check, name: str, mean: Tensor, variance: Tensor, layer: _BatchNorm) -> Iterator[Finding]:
    channels = variance.numel()
    infinite = int((~(mean.isfinite() & variance.isfinite())).sum())
    negative, is_zero = int((variance < 0).sum()), variance == 0
    scale = getattr(layer, "weight", None)
    used = is_zero if scale is None else is_zero & (scale.detach() != 0)
    evidence: dict[str, Any] = {
        "non_finite": infinite,
        "negative": negative,
        "zero": int(is_zero.sum()),
        "channels": channels,
        "first_channel": _first(~(mean.isfinite() & variance.isfinite()) | (variance < 0) | is_zero),
    }
    if infinite:
        yield check.finding(
            name, f"running mean or variance is NaN or inf in {infinite} of {channels} channels", **evidence
        )
    if negative:
        yield check.finding(
            name, f"running variance is negative in {negative} of {channels} channels", **evidence
        )
    if bool(is_zero.any()):
        yield check.finding(
            name,
            f"running variance is 0 in {int(is_zero.sum())} of {channels} channels: eval mode scales "
            f"what differs from the mean by {layer.eps**-0.5 if layer.eps > 0 else math.inf:.0f}",
            severity="warning" if bool(used.any()) else "note",
            **evidence,
        )


def _with_statistics(subject: Subject) -> Iterator[tuple[str, _BatchNorm]]:
    for name, layer in subject.batch_norms.items():
        if layer.running_mean is not None and layer.running_var is not None:
            yield name, layer


def _as_new(layer: _BatchNorm) -> bool:
    return bool((_float(layer.running_mean) == 0).all()) and bool((_float(layer.running_var) == 1).all())


def _float(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().float()


def _first(channels: Tensor) -> int:
    return int(torch.nonzero(channels.flatten())[0]) if bool(channels.any()) else -1
