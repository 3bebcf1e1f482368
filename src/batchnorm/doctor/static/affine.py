"""Scale and shift (gamma and beta): dead channels, dead layers, shifts of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject

# A channel whose |gamma| is below it says nothing to the layer after it.
DEAD = 1e-3
# A share of dead channels that is no more what training and weight decay leave behind.
MANY = 0.5
# Shifts lie close together around their first value when they are this many standard deviations from 0.
_CLOSE = 4.0


@check(
    "BN110",
    "dead scales",
    severity="warning",
    why="A channel with gamma near 0 gives the same number for every input: the layer's width is wasted, "
    "and a layer that is dead as a whole gives nothing but its shift.",
    fix="Take weight decay and L1 penalties off gamma, lower the learning rate; channels that stay dead "
    "can be pruned.",
    needs_data=False,
)
def dead(check: Check, subject: Subject) -> Iterator[Finding]:
    """Any |gamma| below `DEAD`: a note, and from a share of `MANY` of the layer's channels on a warning.

    All of them are a warning, but a note where they are exactly 0 in a layer that is not trained.
    """
    for name, layer in subject.batch_norms.items():
        if not isinstance(layer.weight, Tensor):
            continue
        scale = layer.weight.detach().float().abs()
        is_dead = scale < DEAD
        count, channels = int(is_dead.sum()), scale.numel()
        if not count:
            continue
        evidence: dict[str, Any] = {
            "dead": count,
            "channels": channels,
            "threshold": DEAD,
            "largest": float(scale.max()),
        }
        if count < channels:
            yield check.finding(
                name,
                f"{count} of {channels} scales are below {DEAD:g}",
                severity="warning" if count / channels >= MANY else "note",
                **evidence,
            )
        elif bool((scale == 0).all()) and not subject.is_trained(layer):
            yield check.finding(
                name, f"all {channels} scales are 0, as a residual branch starts", severity="note", **evidence
            )
        else:
            yield check.finding(
                name, f"the layer is dead: all {channels} scales are below {DEAD:g}", **evidence
            )


@check(
    "BN115",
    "weights that are not finite",
    severity="error",
    why="A NaN or inf in gamma or beta makes its whole channel NaN in training and in eval mode.",
    fix="Go back to the last checkpoint that was finite; look for a loss that diverged.",
    needs_data=False,
)
def not_finite(check: Check, subject: Subject) -> Iterator[Finding]:
    """An error for each parameter of a batch norm in which any value is NaN or inf."""
    for name, layer in subject.batch_norms.items():
        for own, parameter in layer.named_parameters(recurse=False):
            bad = int((~torch.isfinite(parameter)).sum())
            if bad:
                yield check.finding(
                    name,
                    f"{own} is NaN or inf in {bad} of {parameter.numel()} channels",
                    parameter=own,
                    non_finite=bad,
                    channels=parameter.numel(),
                )


@check(
    "BN116",
    "shifts that start at one",
    severity="warning",
    why="With beta at 1 instead of 0 a layer's outputs start off centre: sigmoids start saturated on one "
    "side, ReLUs start close to linear.",
    fix="Start beta at 0; report.fix('BN116') sets it where nothing is trained yet.",
    needs_data=False,
)
def shifted(check: Check, subject: Subject) -> Iterator[Finding]:
    """Beta over channels, two or more: |mean| at least 0.5 and at least `_CLOSE` standard deviations.

    A warning where it is the same in all channels (a standard deviation of 1e-5 of the mean or less), else a
    note. Hand-written layers too, by what they were seen to add.
    """
    shifts = {name: seen.shift for name, seen in subject.handwritten.items()}
    shifts |= {
        name: layer.bias for name, layer in subject.batch_norms.items() if isinstance(layer.bias, Tensor)
    }
    for name, given in shifts.items():
        shift = given.detach().double()
        mean = float(shift.mean())
        spread = float(shift.std(correction=0))
        if shift.numel() < 2 or abs(mean) < 0.5 or abs(mean) < _CLOSE * spread:
            continue
        exact = spread <= 1e-5 * abs(mean)
        yield check.finding(
            name,
            f"beta is {mean:.3g} in all {shift.numel()} channels"
            if exact
            else f"beta is {mean:.2f} ± {spread:.2f} in all {shift.numel()} channels: did it start there?",
            severity="warning" if exact else "note",
            mean=mean,
            standard_deviation=spread,
            channels=shift.numel(),
        )
