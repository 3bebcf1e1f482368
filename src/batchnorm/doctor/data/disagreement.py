"""BN301 to BN303: processes whose parameters, running statistics or data are not each other's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.data.noise import rms
from batchnorm.doctor.data.observe import Observed
from batchnorm.doctor.data.processes import Processes
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject

_SHIFT = 0.3


def _processes(subject: Subject) -> Processes | None:
    observed: Observed = subject.observed
    return observed.processes


@check(
    "BN301",
    "processes have different parameters",
    severity="error",
    why="Each process trains or evaluates another model, and gradients are averaged over models that differ.",
    fix="Broadcast the state_dict of rank 0; the same seed before building the model; let DDP synchronise "
    "all.",
    needs_data=True,
)
def parameters_differ(check: Check, subject: Subject) -> Iterator[Finding]:
    found = _processes(subject)
    if found is None:
        return
    if found.failure is not None:
        yield check.finding(
            None,
            f"the {found.count} processes could not be compared: {found.failure}",
            severity="error" if found.different_models else "note",
            processes=found.count,
        )
        return
    assert found.parameters is not None
    names, checksums = found.parameters
    differ = ((checksums - checksums[:1]).abs() > 0).any(2).any(0)
    bad = [name for name, is_bad in zip(names, differ.tolist(), strict=True) if is_bad]
    if bad:
        change = (checksums[:, :, 0] - checksums[:1, :, 0]).abs() / checksums[:1, :, 0].abs().clamp_min(1e-12)
        yield check.finding(
            bad[0].rpartition(".")[0] or None,
            f"{len(bad)} of {len(names)} parameters differ between {found.count} processes, from "
            f"{bad[0]!r} on",
            effect=float(change.max()),
            standard_error=0.0,
            noise_alone=0.0,
            parameters=len(bad),
            processes=found.count,
        )


@check(
    "BN302",
    "processes have different running statistics",
    severity="warning",
    why="Each process evaluates another model; a checkpoint keeps those of one process, from its share of "
    "the data.",
    fix="batchnorm.model.merge_running_statistics(model), sync=True, or bn.recalibrate(model, loader, "
    "group=...).",
    needs_data=True,
)
def running_statistics_differ(check: Check, subject: Subject) -> Iterator[Finding]:
    found = _processes(subject)
    if found is None or found.buffers is None or found.data is None:
        return
    for name, layer in subject.observed.layers.items():
        prefix = f"{name}." if name else ""
        means, variances = (found.buffers.get(f"{prefix}running_{kind}") for kind in ("mean", "var"))
        if means is None or variances is None or name not in found.data:
            continue
        spread = means.std(0) / (variances.mean(0) + layer.eps).sqrt()
        ratio = (torch.log(variances + layer.eps)).std(0)
        shift = math.hypot(rms(spread), rms(ratio))
        if shift == 0:
            continue
        moments = found.data[name][0]
        noise = (moments[:, 2] / (moments[:, 1] + layer.eps)).mean(0) / layer.batches_averaged
        chance = rms(noise.sqrt())
        grave = shift > _SHIFT and rms(spread) > 3 * chance
        grave |= rms(ratio) > math.log(2)
        yield check.finding(
            name,
            f"running means differ by {rms(spread):.2g} std between {found.count} processes (chance "
            f"{chance:.2g}), variances by a factor {math.exp(rms(ratio)):.2g}",
            severity="warning" if grave else "note",
            effect=rms(spread),
            standard_error=chance,
            noise_alone=chance,
            processes=found.count,
        )


@check(
    "BN303",
    "processes have different data",
    severity="warning",
    why="Without sync each process normalises by its own kind of data, and rank 0's statistics stand for "
    "all.",
    fix="DistributedSampler(shuffle=True) over all the data; sync=True.",
    needs_data=True,
)
def data_differ(check: Check, subject: Subject) -> Iterator[Finding]:
    found = _processes(subject)
    if found is None or not found.data:
        return
    first = next(iter(found.data))
    moments, batches = found.data[first]
    scale = moments[:, 1].mean(0).clamp_min(1e-12)
    spread = moments[:, 0].std(0) / scale.sqrt()
    noise = (moments[:, 2] / torch.tensor(batches)[:, None] / scale).mean(0)
    shift, chance = rms(spread), rms(noise.sqrt())
    if shift > _SHIFT and shift > 3 * chance:
        yield check.finding(
            first,
            f"the means of what the first batch norm is given differ by {shift:.2g} std between "
            f"{found.count} processes (chance {chance:.2g})",
            effect=shift,
            standard_error=chance,
            noise_alone=chance,
            processes=found.count,
        )
