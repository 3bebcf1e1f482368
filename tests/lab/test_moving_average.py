"""The moving-average demonstration against the tutorial's own loop."""

import statistics
import subprocess
import sys

import pytest

from batchnorm.lab.moving_average import cumulative_average, moving_average


def test_equals_the_tutorials_loop() -> None:
    average = 0.0
    for _ in range(10):
        for mean in [1, 2, 3, 4, 5]:
            average = 0.9 * average + (1.0 - 0.9) * mean
    *_, last = moving_average([1, 2, 3, 4, 5] * 10)
    assert last == pytest.approx(average)
    assert 3.0 < last < 3.3  # near 3, and above: the latest batches were 4 and 5


def test_cumulative_average_is_the_plain_mean() -> None:
    values = [3.0, -1.0, 10.0, 0.5]
    wanted = [statistics.fmean(values[: n + 1]) for n in range(4)]
    assert list(cumulative_average(values)) == pytest.approx(wanted)


def test_prints_a_table() -> None:
    command = [sys.executable, "-m", "batchnorm.lab.moving_average"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[1].split() == ["1", "1.3144", "3.0000"]
    assert lines[10].split() == ["10", "3.1932", "3.0000"]
