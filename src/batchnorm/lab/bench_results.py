"""What a benchmark gave, case by shape, and the ratios and means of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from batchnorm.lab.bench_cases import CASES, DTYPES, Shape
from batchnorm.lab.bench_probes import Timing
from batchnorm.lab.machine import machine, versions

TORCH, COMPILED, OURS, FLOOR = "torch.nn", "torch.compile", "batchnorm", "floor"

# On a GPU, where it is the layout that decides which of torch's kernels runs.
TORCH_OTHER_LAYOUT = "torch.nn, other layout"

# Summaries: mean speed over shapes of so many elements, mean distance to the floor over shapes of so many.
LARGE, HUGE = 50_000, 1_000_000


@dataclass(frozen=True)
class Result:
    """What one case gave for one shape; `notes` say why contenders are missing."""

    case: str
    shape: Shape
    timings: dict[str, Timing]
    saved_bytes: dict[str, int]
    notes: tuple[str, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def elements(self) -> int:
        """Of the input."""
        return math.prod(self.shape)

    @property
    def speedup(self) -> float:
        """torch.nn's time over ours: above 1 ours is faster."""
        return self.timings[TORCH].ms / self.timings[OURS].ms

    @property
    def over_floor(self) -> float:
        """Our time over the plain copy's."""
        return self.timings[OURS].ms / self.timings[FLOOR].ms

    @property
    def bandwidth(self) -> float:
        """GB/s (1e9 bytes) at which we move what any batch norm has to: each tensor once per pass."""
        return self._bytes(CASES[self.case].tensors) / self.timings[OURS].ms / 1e6

    @property
    def copy_bandwidth(self) -> float:
        """GB/s of the plain copies."""
        return self._bytes(5 if CASES[self.case].backward else 2) / self.timings[FLOOR].ms / 1e6

    def _bytes(self, tensors: int) -> int:
        return tensors * self.elements * DTYPES[self.dtype].itemsize

    @property
    def saved_ratio(self) -> float:
        """Bytes that we save for backward over those of torch.nn."""
        return self.saved_bytes[OURS] / self.saved_bytes[TORCH]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with layout and ratios."""
        return {
            **asdict(self),
            "layout": "channels_last" if CASES[self.case].channels_last else "contiguous",
            "speedup": self.speedup,
            "over_floor": self.over_floor,
            "saved_ratio": self.saved_ratio,
            "gigabytes_per_second": self.bandwidth,
            "copy_gigabytes_per_second": self.copy_bandwidth,
        }


@dataclass(frozen=True)
class Summary:
    """Geometric mean of a ratio over the `shapes` that are large enough, None without any; and the worst."""

    mean: float | None
    shapes: int
    worst: float
    worst_shape: Shape


def speedups(results: Sequence[Result]) -> dict[str, Summary]:
    """By case: mean of torch.nn's time over ours for the LARGE shapes, and the worst of all shapes."""
    summaries = {}
    for case in dict.fromkeys(result.case for result in results):
        of_case = [result for result in results if result.case == case]
        worst = min(of_case, key=lambda result: result.speedup)
        mean, count = _mean([result.speedup for result in of_case if result.elements >= LARGE])
        summaries[case] = Summary(mean, count, worst.speedup, worst.shape)
    return summaries


def over_floor(results: Sequence[Result]) -> Summary | None:
    """Mean and worst of our time over the floor's, of plain forward+backward for the HUGE shapes, if any."""
    huge = [result for result in results if result.case == "forward+backward" and result.elements >= HUGE]
    if not huge:
        return None
    worst = max(huge, key=lambda result: result.over_floor)
    mean, count = _mean([result.over_floor for result in huge])
    return Summary(mean, count, worst.over_floor, worst.shape)


def means_on_gpu(results: Sequence[Result]) -> dict[str, tuple[float, float | None]]:
    """By case, geometric means: our share of the copies' bandwidth, and torch.compile's time over ours."""
    means = {}
    for case in dict.fromkeys(result.case for result in results):
        of_case = [result for result in results if result.case == case]
        share = statistics.geometric_mean(result.bandwidth / result.copy_bandwidth for result in of_case)
        timings = [result.timings for result in of_case if COMPILED in result.timings]
        compiled, _ = _mean([timing[COMPILED].ms / timing[OURS].ms for timing in timings])
        means[case] = share, compiled
    return means


def report(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Plain values of all of it, with machine and versions."""
    floor = over_floor(results)
    return {
        "results": [result.as_dict() for result in results],
        "speedups": {case: asdict(summary) for case, summary in speedups(results).items()},
        "over_floor": None if floor is None else asdict(floor),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "machine": machine(),
    }


def _mean(ratios: list[float]) -> tuple[float | None, int]:
    return (statistics.geometric_mean(ratios) if ratios else None), len(ratios)
