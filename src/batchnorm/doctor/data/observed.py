"""Observed: what a handful of batches showed, on one rank or on all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from batchnorm.doctor.data.differences import Differences
from batchnorm.doctor.data.layers import Layer
from batchnorm.doctor.data.mates import Mates
from batchnorm.doctor.data.merge import (
    earliest,
    largest,
    merge_differences,
    merge_passes,
)
from batchnorm.doctor.data.noise import Population, population
from batchnorm.doctor.data.padding import Padding
from batchnorm.doctor.data.processes import Process, Processes
from batchnorm.doctor.data.steps import Steps
from batchnorm.doctor.data.watch import NotFinite, Pass
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.pictures import LayerPicture
from batchnorm.model.packing import sent


@sent
@dataclass
class Observed:
    """What a handful of batches showed; checks read it.

    Attributes:
        layers: the observed layers, in order of execution, then those that no data reached.
        never_moved: layers whose running statistics were those of a new layer.
        by_batch: each layer normalised by the batch, all else in eval mode.
        by_running: eval mode.
        of_running: how far what `by_running` gives is from what `by_batch` gives.
        recalibrated: eval mode, with the population statistics in place of the running ones; or None.
        of_recalibrated: as `of_running`, of `recalibrated`.
        populations: of each layer's inputs in `by_batch`.
        not_finite: the first inf or NaN.
        moved_in_eval: by layer, how far its statistics moved in eval mode, in standard deviations.
        in_training_mode: layers that were in training mode although the model was put in eval mode.
        largest: the largest output of each channel in `by_batch`.
        rectified: layers whose output goes into a ReLU.
        padding: by layer.
        steps: of training.
        mates: the same samples in another batch, or None.
        process: what this process has, before it is merged with the others'.
        processes: what all processes have, or None.
        failure: of a forward.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    never_moved: set[str] = field(default_factory=set)
    by_batch: Pass = field(default_factory=Pass)
    by_running: Pass = field(default_factory=Pass)
    of_running: Differences = field(default_factory=Differences)
    recalibrated: Pass | None = None
    of_recalibrated: Differences | None = None
    populations: dict[str, Population] = field(default_factory=dict)
    not_finite: NotFinite | None = None
    moved_in_eval: dict[str, float] = field(default_factory=dict)
    in_training_mode: set[str] = field(default_factory=set)
    largest: dict[str, Tensor] = field(default_factory=dict)
    rectified: set[str] = field(default_factory=set)
    padding: dict[str, Padding] = field(default_factory=dict)
    steps: Steps = field(default_factory=Steps)
    mates: Mates | None = None
    process: Process | None = None
    processes: Processes | None = None
    failure: Finding | None = None

    def pictures(self) -> list[LayerPicture]:
        """Running against population statistics, of each layer that has both."""
        found = []
        for name, seen in self.populations.items():
            statistics = self.layers[name].statistics
            if statistics is not None:
                found.append(LayerPicture(name, *statistics, seen.mean, seen.var))
        return found


def merged(parts: Sequence[Observed]) -> Observed:
    """What one process would have observed on the batches of all ranks; without layers."""
    by_batch = merge_passes([part.by_batch for part in parts])
    recalibrated = [part.recalibrated for part in parts if part.recalibrated is not None]
    paddings = {name: None for part in parts for name in part.padding}
    return Observed(
        by_batch=by_batch,
        by_running=merge_passes([part.by_running for part in parts]),
        of_running=Differences.merge([part.of_running for part in parts]),
        recalibrated=merge_passes(recalibrated) if recalibrated else None,
        of_recalibrated=merge_differences([part.of_recalibrated for part in parts]),
        populations={name: population(calls) for name, calls in by_batch.statistics.items()},
        not_finite=first_not_finite([part.not_finite for part in parts]),
        moved_in_eval=largest([part.moved_in_eval for part in parts]),
        in_training_mode=set().union(*[part.in_training_mode for part in parts]),
        largest=largest([part.largest for part in parts]),
        rectified=set().union(*[part.rectified for part in parts]),
        padding={
            name: found
            for name in paddings
            if (found := earliest(part.padding.get(name) for part in parts)) is not None
        },
        failure=first_failure([part.failure for part in parts]),
    )


def first_not_finite(found: Sequence[NotFinite | None]) -> NotFinite | None:
    """In eval mode, else by the batch."""
    in_eval = [one for one in found if one is not None and not one.by_batch]
    return earliest(in_eval or found)


def first_failure(failures: Sequence[Finding | None]) -> Finding | None:
    """That of the first batch that failed."""
    known = [failure for failure in failures if failure is not None]
    return min(known, key=lambda failure: int(failure.evidence["batch"] or 0), default=None)
