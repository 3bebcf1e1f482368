"""What the optimizer does to batch norms: weight decay on their scales and shifts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject
from batchnorm.model.batch_norms import is_number

# Below it the pull is the one of common recipes (SGD with 0.1 and 5e-4, AdamW with 1e-3 and 0.05).
STRONG_PULL = 1e-4


@check(
    "BN102",
    "weight decay on gamma or beta",
    severity="warning",
    why="A decayed scale regularises nothing, the next layer makes up for it, and it pulls every channel "
    "towards dead (He et al. 2019, Bag of Tricks, section 3.1).",
    fix="Give the optimizer bn.parameter_groups(model, weight_decay); report.fix('BN102') moves gamma and"
    " beta into a group without decay and keeps the optimizer's state.",
    needs_data=False,
)
def weight_decay(check: Check, subject: Subject) -> Iterator[Finding]:
    """A layer whose weight or bias learns in a group of the optimizer with weight decay.

    A warning where `lr * weight_decay` of the first of them is above `STRONG_PULL`; else, or without a
    learning rate, a note. A step of SGD or AdamW without a gradient leaves `1 - lr * weight_decay` of a
    value: half of it after about `log(2) / (lr * weight_decay)` steps.
    """
    if subject.optimizer is None:
        return
    groups = {parameter: group for group in subject.optimizer.param_groups for parameter in group["params"]}
    for name, layer in subject.batch_norms.items():
        decayed = {
            own: groups[p]
            for own, p in layer.named_parameters(recurse=False)
            if p.requires_grad and p in groups and _number(groups[p], "weight_decay")
        }
        if not decayed:
            continue
        group = next(iter(decayed.values()))
        decay, rate = _number(group, "weight_decay") or 0.0, _number(group, "lr")
        pull = 0.0 if rate is None else decay * rate
        what = f"weight decay {decay:g} shrinks its {' and '.join(decayed)}"
        half_life = None
        if pull > 0:
            half_life = math.log(2) / pull
            steps = f"{float(f'{half_life:.2g}'):,.0f}"
            what += f", by half in {steps} steps at lr {rate:g} if no gradient works against it"
        yield check.finding(
            name,
            what,
            severity="warning" if pull > STRONG_PULL else "note",
            weight_decay=decay,
            lr=rate,
            half_life_steps=half_life,
        )


def _number(group: Mapping[str, Any], name: str) -> float | None:
    """What a group holds by that name; None where it is not one number."""
    value = group.get(name)
    return float(value) if is_number(value) else None
