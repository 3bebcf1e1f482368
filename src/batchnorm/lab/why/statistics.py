"""From a number per seed to a mean with its confidence interval, and from these to a verdict, by rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from batchnorm.lab.why.experiment import Measure, Verdict

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval by Student's t; unbounded for one value or one not finite."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of one value per seed, `mean ± t * s / sqrt(n)` with n - 1 degrees of freedom (Student 1908).

        Raises:
            ValueError: there are no values.
        """
        if not values:
            raise ValueError("an interval needs one value or more, got none")
        if not all(map(math.isfinite, values)):
            return cls(math.nan, -math.inf, math.inf)
        mean = statistics.fmean(values)
        if len(values) == 1:
            return cls(mean, -math.inf, math.inf)
        t = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
        half = t * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)


def verdict(measures: Sequence[Measure]) -> Verdict:
    """What the measures with a threshold say of the claim.

    "supported" where the interval of every one of them lies above its threshold, "not supported" where the
    interval of one lies below, else "undecided here"; so too without any such measure.
    """
    deciding = [(Interval.of(measure.values), measure.above) for measure in measures]
    decided = [(interval, above) for interval, above in deciding if above is not None]
    if any(interval.high < above for interval, above in decided):
        return "not supported"
    if decided and all(interval.low > above for interval, above in decided):
        return "supported"
    return "undecided here"
