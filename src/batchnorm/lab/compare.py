"""Norms side by side: the same training with each, over several seeds, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from batchnorm.lab.data import Dataset
from batchnorm.lab.evaluate import test_accuracy_by_batch
from batchnorm.lab.machine import machine, versions
from batchnorm.lab.memory import MemoryGrowth, memory_growth
from batchnorm.lab.recipes import Config
from batchnorm.lab.train import Training


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a value over seeds (0 for a single seed)."""

    mean: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value per seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.spread:.3f}"


@dataclass(frozen=True)
class Row:
    """What one norm gave.

    `accuracy` is that of the test set by running statistics, `accuracy_by_batch` with each test batch
    normalised by itself, both after the last epoch; `steps_per_second` is the median over all epochs of
    all seeds, `relative_speed` its ratio to torch's (to the first norm's where torch is not compared).
    """

    norm: str
    accuracy: Spread
    accuracy_by_batch: Spread
    steps_per_second: float
    relative_speed: float
    memory: MemoryGrowth
    accuracy_per_epoch: list[list[float]]


@dataclass(frozen=True)
class Comparison:
    """The rows, and what they were made with; `config.norm` and `config.seed` are the first ones."""

    config: Config
    seeds: int
    rows: list[Row]

    @property
    def baseline(self) -> str:
        """The norm that speeds are relative to."""
        return _baseline([row.norm for row in self.rows])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with versions and machine."""
        return {**asdict(self), "versions": versions(), "machine": machine()}


def compare(
    config: Config,
    dataset: Dataset,
    norms: Sequence[str],
    seeds: int,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> Comparison:
    """Train with every norm and seed, an epoch of each in turn, so that a drifting machine hurts all alike.

    Args:
        config: of all the runs, but for norm and seed.
        norms: names of norms; torch's is what speeds are relative to.
        seeds: how many, counted from `config.seed`.
        on_steps: told now and then how many steps were done.
    """
    memory = {norm: memory_growth(norm, batch_size=min(config.batch_size, 32)) for norm in norms}
    runs = {
        norm: [Training(replace(config, norm=norm, seed=config.seed + k), dataset) for k in range(seeds)]
        for norm in norms
    }
    for _ in range(config.epochs):
        for k in range(seeds):
            for norm in norms:
                runs[norm][k].run_epoch(on_steps)
    speeds = {norm: _steps_per_second(trainings) for norm, trainings in runs.items()}
    baseline = speeds[_baseline(norms)]
    rows = [
        Row(
            norm,
            Spread.of([training.history[-1].accuracy for training in trainings]),
            Spread.of([_accuracy_by_batch(training) for training in trainings]),
            speeds[norm],
            speeds[norm] / baseline,
            memory[norm],
            [[result.accuracy for result in training.history] for training in trainings],
        )
        for norm, trainings in runs.items()
    ]
    return Comparison(config, seeds, rows)


def _baseline(norms: Sequence[str]) -> str:
    return "torch" if "torch" in norms else norms[0]


def _steps_per_second(trainings: Sequence[Training]) -> float:
    return statistics.median(
        training.steps_per_epoch / result.seconds for training in trainings for result in training.history
    )


@torch.no_grad()
def _accuracy_by_batch(training: Training) -> float:
    return test_accuracy_by_batch(training.model, training.dataset, training.config.batch_size)
