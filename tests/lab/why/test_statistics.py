"""Intervals are Student's, and the verdict follows from them by rule."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from batchnorm.lab.why.experiment import Measure
from batchnorm.lab.why.statistics import Interval, verdict

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12)


def measure(values: list[float], above: float | None) -> Measure:
    return Measure("something", "points", values, above)


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=12, unique=True))
def test_the_interval_is_scipys(values: list[int]) -> None:
    interval = Interval.of(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=interval.mean, scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high))


@given(VALUES, st.floats(-1e6, 1e6))
def test_an_interval_moves_with_its_values(values: list[float], shift: float) -> None:
    interval, moved = Interval.of(values), Interval.of([value + shift for value in values])
    assert moved.mean == pytest.approx(interval.mean + shift, abs=1e-3)
    assert moved.high - moved.low == pytest.approx(interval.high - interval.low, abs=1e-3)


@given(VALUES, st.floats(-1e6, 1e6))
def test_one_measure_decides_by_where_its_interval_lies(values: list[float], above: float) -> None:
    interval = Interval.of(values)
    expected = (
        "supported"
        if interval.low > above
        else "not supported"
        if interval.high < above
        else "undecided here"
    )
    assert verdict([measure(values, above)]) == expected


@given(st.lists(st.tuples(VALUES, st.floats(-1e6, 1e6)), min_size=1, max_size=4))
def test_many_measures_decide_together(measured: list[tuple[list[float], float]]) -> None:
    each = [verdict([measure(*one)]) for one in measured]
    together = verdict([measure(*one) for one in measured])
    assert (together == "supported") == all(one == "supported" for one in each)
    assert (together == "not supported") == any(one == "not supported" for one in each)


@given(st.lists(st.tuples(VALUES, st.floats(-1e6, 1e6)), max_size=3), VALUES)
def test_what_has_no_threshold_decides_nothing(
    measured: list[tuple[list[float], float]], values: list[float]
) -> None:
    deciding = [measure(*one) for one in measured]
    assert verdict([*deciding, measure(values, None)]) == verdict(deciding)


@pytest.mark.parametrize("values", [[3.0], [1.0, math.nan], [1.0, math.inf, 2.0]])
def test_one_value_or_one_not_finite_decides_nothing(values: list[float]) -> None:
    assert verdict([measure(values, 0)]) == "undecided here"
    assert (Interval.of(values).low, Interval.of(values).high) == (-math.inf, math.inf)


def test_nothing_measured_decides_nothing() -> None:
    assert verdict([]) == "undecided here"
    with pytest.raises(ValueError, match="one value or more"):
        Interval.of([])
