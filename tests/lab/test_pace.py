"""Pace: time per epoch, and the time until an accuracy."""

import pytest

from batchnorm.lab.pace import pace_line, seconds_per_epoch, seconds_until
from batchnorm.lab.train import EpochResult


def history(*results: tuple[float, float]) -> list[EpochResult]:
    return [
        EpochResult(epoch, 0.5, accuracy, seconds) for epoch, (accuracy, seconds) in enumerate(results, 1)
    ]


def test_until_an_accuracy_counts_the_epochs_before() -> None:
    results = history((0.8, 3.0), (0.9, 1.0), (0.85, 1.0), (0.95, 1.5))
    assert seconds_per_epoch(results) == 1.25
    assert seconds_until(results, 0.9) == (2, 4.0)
    assert seconds_until(results, 0.94) == (4, 6.5)
    assert seconds_until(results, 0.96) is None


@pytest.mark.parametrize(
    ("results", "line"),
    [
        (
            history((0.8, 3.0), (0.9, 1.0), (0.85, 1.0)),
            "3 epochs of training in 5.00 s, 1.00 s an epoch (median); accuracy 0.90 after epoch 2, 4.00 s",
        ),
        (
            history((0.8, 3.0)),
            "1 epoch of training in 3.00 s, 3.00 s an epoch (median); accuracy 0.90 not reached",
        ),
    ],
)
def test_in_a_line(results: list[EpochResult], line: str) -> None:
    assert pace_line(results) == line
