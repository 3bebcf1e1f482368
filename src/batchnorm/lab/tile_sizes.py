"""Sizes of tiles and numbers of programs for `kernels/cuda/plan.py`, by trying them on a GPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from batchnorm.kernels.cuda import plan as planning
from batchnorm.kernels.cuda.thresholds import everywhere
from batchnorm.lab.bench import data, layers
from batchnorm.lab.bench_cases import DTYPES, Case, Shape
from batchnorm.lab.bench_probes import Contender, DeviceClock, take_turns
from batchnorm.lab.bench_results import OURS

CANDIDATES: dict[str, tuple[int, ...]] = {
    "TILE": (2048, 4096, 8192),
    "ROW_CHANNELS": (32, 64, 128),
    "PROGRAMS_PER_MULTIPROCESSOR": (2, 4, 8),
    "PER_WARP": (512, 1024, 2048),
    "WHOLE_FORWARD": (4096, 8192, 16384, 32768),
    "WHOLE_BACKWARD": (2048, 4096, 8192, 16384),
}
# Less than this share gained is noise.
_GAIN = 0.005


@contextmanager
def constants(values: Mapping[str, int]) -> Iterator[None]:
    """Inside, the plans are made by these constants of `plan.py`."""
    before = {name: getattr(planning, name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def best(
    seconds: Callable[[], float], on_try: Callable[[dict[str, int], float], None] = lambda values, time: None
) -> dict[str, int]:
    """The constants with the least time, each chosen in turn while the others stay, twice over.

    Args:
        seconds: the time with the constants that are set; what cannot run with them takes for ever.
        on_try: told what was tried and its time.
    """
    chosen = {name: getattr(planning, name) for name in CANDIDATES}
    times: dict[tuple[int, ...], float] = {}

    def time_of(values: dict[str, int]) -> float:
        key = tuple(values.values())
        if key not in times:
            with constants(values):
                try:
                    times[key] = seconds()
                except Exception:  # too much for the registers or the shared memory of this card
                    times[key] = math.inf
            on_try(values, times[key])
        return times[key]

    for _ in range(2):
        for name, candidates in CANDIDATES.items():
            for candidate in candidates:
                other = chosen | {name: candidate}
                if time_of(other) < (1 - _GAIN) * time_of(chosen):
                    chosen = other
    return chosen


def gpu_seconds(
    settings: Sequence[tuple[str, Case]], shapes: Sequence[Shape], device: torch.device, seconds: float
) -> float:
    """Geometric mean of our layers' times, by the GPU's events."""
    clock = DeviceClock(device)
    times = []
    for dtype, case in settings:
        for shape in shapes:
            inputs, gradient = data(case, shape, device, DTYPES[dtype])
            contender = Contender.training(layers(case, shape, device)[1], inputs, gradient)
            with everywhere():
                times.append(take_turns({OURS: contender}, seconds, clock)[OURS].ms / 1e3)
    return statistics.geometric_mean(times)


def _set(values: Mapping[str, int]) -> None:
    for name, value in values.items():
        setattr(planning, name, value)
    planning.plan.cache_clear()
