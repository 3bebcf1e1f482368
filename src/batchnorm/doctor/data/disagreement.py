"""BN301 to BN303: processes whose parameters, running statistics or data are not each other's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.data.noise import rms
from batchnorm.doctor.data.observed import Observed
from batchnorm.doctor.data.processes import Processes
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject
from batchnorm.model.ranks import apart, first_difference, said

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
    """An error where the checksums of a parameter are not equal in all processes; NaN equals NaN.

    One finding, in the layer of the first such parameter. Of the model instead: an error where names or
    shapes differ between processes, and a note where the processes could not be gathered.
    """
    found = _processes(subject)
    if found is None:
        return
    count = len(found.ranks)
    if found.failure is not None:
        yield check.finding(
            None,
            f"the {count} processes could not be compared: {found.failure}",
            severity="note",
            processes=count,
        )
        return
    if not found.alike:
        yield _different_models(check, found)
        return
    names = list(found.each[0].shapes)
    checksums = torch.stack([process.checksums for process in found.each])
    equal = (checksums == checksums[:1]) | (checksums.isnan() & checksums[:1].isnan())
    bad = [name for name, is_equal in zip(names, equal.all(2).all(0).tolist(), strict=False) if not is_equal]
    if bad:
        change = (checksums[:, :, 0] - checksums[:1, :, 0]).abs() / checksums[:1, :, 0].abs().clamp_min(1e-12)
        yield check.finding(
            bad[0].rpartition(".")[0] or None,
            f"{len(bad)} of {checksums.shape[1]} parameters differ between {count} processes, from "
            f"{bad[0]!r} on: {apart(found.ranks, [_bits(own) for own in checksums])}",
            effect=float(change.nan_to_num(math.inf).max()),
            standard_error=0.0,
            noise_alone=0.0,
            parameters=len(bad),
            processes=count,
        )


def _different_models(check: Check, found: Processes) -> Finding:
    return check.finding(
        None,
        f"the {len(found.ranks)} processes have different models, "
        f"{first_difference(found.ranks, [process.shapes for process in found.each])}. "
        "What each observed was not merged",
        processes=len(found.ranks),
    )


def _bits(*tensors: torch.Tensor) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


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
    """Running statistics that are not equal in all processes: a note; far more so than by chance, a warning.

    For m and v the RMS over channels of the standard deviation over processes of the running mean (in the
    root of the mean running variance plus eps) and of the logarithm of the running variance plus eps: a
    warning where `hypot(m, v) > _SHIFT` and m is more than 3 times chance, or where `v > log(2)`. Chance is
    the noise of a mean over `batches_averaged` batches. Not of models that differ in structure.
    """
    found = _processes(subject)
    if found is None or not found.each or not found.alike:
        return
    for name, layer in subject.observed.layers.items():
        prefix = f"{name}." if name else ""
        named = [f"{prefix}running_mean", f"{prefix}running_var"]
        populations = [p.populations[name] for p in found.each if name in p.populations]
        if not populations or not all(one in process.buffers for process in found.each for one in named):
            continue
        means, variances = (torch.stack([process.buffers[one] for process in found.each]) for one in named)
        spread = means.std(0) / (variances.mean(0) + layer.eps).sqrt()
        ratio = (torch.log(variances + layer.eps)).std(0)
        shift = math.hypot(rms(spread), rms(ratio))
        if shift == 0:
            continue
        noises = [seen.mean_noise / (seen.var + layer.eps) for seen in populations]
        noise = torch.stack(noises).mean(0) / layer.batches_averaged
        chance = rms(noise.sqrt())
        grave = shift > _SHIFT and rms(spread) > 3 * chance
        grave |= rms(ratio) > math.log(2)
        yield check.finding(
            name,
            f"running means differ by {rms(spread):.2g} std between {len(found.ranks)} processes (chance "
            f"{chance:.2g}), variances by a factor {math.exp(rms(ratio)):.2g}: "
            + apart(found.ranks, [_bits(*own) for own in zip(means, variances, strict=True)]),
            severity="warning" if grave else "note",
            effect=rms(spread),
            standard_error=chance,
            noise_alone=chance,
            processes=len(found.ranks),
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
    """A warning where the means of the first layer's inputs differ by more than `_SHIFT` and 3 times chance.

    The standard deviation over the processes that have batches, two or more, in the root of the mean
    variance; RMS over channels. Chance is the noise of the mean of a process's batches. Not of models that
    differ in structure.
    """
    found = _processes(subject)
    if found is None or not found.alike:
        return
    first = next((name for process in found.each for name in process.populations), None)
    with_data = [
        (rank, process.populations[first])
        for rank, process in zip(found.ranks, found.each, strict=False)
        if first is not None and first in process.populations
    ]
    if first is None or len(with_data) < 2:
        return
    means, variances = (
        torch.stack([getattr(seen, name) for _, seen in with_data]) for name in ("mean", "var")
    )
    scale = variances.mean(0).clamp_min(1e-12)
    spread = means.std(0) / scale.sqrt()
    noise = torch.stack([seen.mean_noise / seen.batches / scale for _, seen in with_data]).mean(0)
    shift, chance = rms(spread), rms(noise.sqrt())
    if shift > _SHIFT and shift > 3 * chance:
        apart_by = [rms((mean - means.mean(0)) / scale.sqrt()) for mean in means]
        furthest = with_data[apart_by.index(max(apart_by))][0]
        yield check.finding(
            first,
            f"the means of what the first batch norm is given differ by {shift:.2g} std between "
            f"{len(with_data)} processes (chance {chance:.2g}), of which "
            f"{said([furthest])} is furthest from their mean",
            effect=shift,
            standard_error=chance,
            noise_alone=chance,
            processes=len(with_data),
        )
