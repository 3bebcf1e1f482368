"""Running statistics as they lie in the buffers: never updated, not finite, negative or zero."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject
from batchnorm.model.freeze import is_frozen


@check(
    "BN108",
    "statistics never updated",
    severity="error",
    why="Eval mode normalises by mean 0 and variance 1, which are not this layer's: predictions are far from "
    "those of training.",
    fix="bn.recalibrate(model, loader), or report.fix('BN108') with a loader. Look for why: momentum=0, weights "
    "loaded without their buffers, a layer never called in training mode.",
    needs_data=False,
)
def never_updated(check: Check, subject: Subject) -> Iterator[Finding]:
    others_trained = any(subject.is_trained(layer) for layer in subject.batch_norms.values())
    for name, layer in _with_statistics(subject):
        if not _as_new(layer):
            continue
        trained = subject.is_trained(layer)
        if trained:
            yield check.finding(
                name,
                "running mean 0 and variance 1 in every channel, as when new, but its weights are trained",
                severity="note" if is_frozen(layer) else "error",  # type: ignore[arg-type]
                num_batches_tracked=_counter(layer),
                channels=int(layer.running_mean.numel()),  # type: ignore[operator, union-attr]
            )
        elif others_trained:
            yield check.finding(
                name,
                "statistics and weights as when new in a trained model: is the layer used in training?",
                severity="note",
                num_batches_tracked=_counter(layer),
                channels=int(layer.running_mean.numel()),  # type: ignore[operator, union-attr]
            )


@check(
    "BN109",
    "running statistics that cannot be",
    severity="error",
    why="Eval mode divides by the root of the running variance: NaN, inf and negative values spread to every "
    "output, and a variance of zero scales its channel up by 1/sqrt(eps).",
    fix="Find the batch that did it (non-finite inputs or a loss that diverged), then bn.recalibrate(model, "
    "loader); report.fix('BN109') does with a loader.",
    needs_data=False,
)
def impossible(check: Check, subject: Subject) -> Iterator[Finding]:
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


def _bad(check: Check, name: str, mean: Tensor, variance: Tensor, layer: nn.Module) -> Iterator[Finding]:
    channels = variance.numel()
    infinite = int((~(mean.isfinite() & variance.isfinite())).sum())
    negative, is_zero = int((variance < 0).sum()), variance == 0
    scale = getattr(layer, "weight", None)
    used = is_zero if scale is None else is_zero & (scale.detach() != 0)
    evidence = {
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
            f"running variance is 0 in {int(is_zero.sum())} of {channels} channels: what differs from the mean "
            f"there is scaled up {float(layer.eps) ** -0.5 if layer.eps else float('inf'):.0f} fold in eval mode",  # type: ignore[arg-type, operator]
            severity="warning" if bool(used.any()) else "note",
            **evidence,
        )


def _with_statistics(subject: Subject) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in subject.batch_norms.items():
        if layer.running_mean is not None and layer.running_var is not None:
            yield name, layer


def _as_new(layer: nn.Module) -> bool:
    return bool((_float(layer.running_mean) == 0).all()) and bool((_float(layer.running_var) == 1).all())


def _counter(layer: nn.Module) -> int | None:
    counter = getattr(layer, "num_batches_tracked", None)
    return None if counter is None else int(counter)


def _float(tensor: Tensor | nn.Module) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().float()


def _first(channels: Tensor) -> int:
    return int(torch.nonzero(channels.flatten())[0]) if bool(channels.any()) else -1
