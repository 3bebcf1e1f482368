"""How fast a training went: its time per epoch, and when it reached an accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import accumulate

from batchnorm.lab.train import EpochResult

GOOD_ACCURACY = 0.9


def seconds_per_epoch(history: Sequence[EpochResult]) -> float:
    """Median: the first epoch compiles, and chooses kernels, besides."""
    return statistics.median(result.seconds for result in history)


def seconds_until(history: Sequence[EpochResult], accuracy: float) -> tuple[int, float] | None:
    """The epoch after which the test accuracy was first so high, and the seconds of training so far."""
    spent = accumulate(result.seconds for result in history)
    for result, seconds in zip(history, spent, strict=True):
        if result.accuracy >= accuracy:
            return result.epoch, seconds
    return None


def pace_line(history: Sequence[EpochResult]) -> str:
    """Both in a line, of one epoch or more."""
    total = sum(result.seconds for result in history)
    line = (
        f"{len(history)} epoch{'s' if len(history) > 1 else ''} of training in {total:.2f} s, "
        f"{seconds_per_epoch(history):.2f} s an epoch (median)"
    )
    reached = seconds_until(history, GOOD_ACCURACY)
    if reached is None:
        return f"{line}; accuracy {GOOD_ACCURACY:.2f} not reached"
    epoch, seconds = reached
    return f"{line}; accuracy {GOOD_ACCURACY:.2f} after epoch {epoch}, {seconds:.2f} s"
