"""The tutorial's moving-average demonstration: five batch means over and over, and what one keeps of them.

python -m batchnorm.lab.moving_average
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def moving_average(values: Iterable[float], decay: float = 0.9, start: float = 0.0) -> Iterator[float]:
    """`average = decay * average + (1 - decay) * value` after each value, from `start`.

    `decay` is the weight of the past (Keras's meaning of momentum); torch's momentum is `1 - decay`.
    """
    average = start
    for value in values:
        average = decay * average + (1 - decay) * value
        yield average


def cumulative_average(values: Iterable[float]) -> Iterator[float]:
    """The plain mean of the values so far, after each value: torch's `momentum=None`."""
    average = 0.0
    for seen, value in enumerate(values, start=1):
        average += (value - average) / seen
        yield average


def main() -> None:
    """Print both averages of 1, 2, 3, 4, 5 after each of the tutorial's ten rounds."""
    means = [1.0, 2.0, 3.0, 4.0, 5.0] * 10
    exponential, cumulative = list(moving_average(means)), list(cumulative_average(means))
    print("round  moving average  plain mean")
    for last in range(4, len(means), 5):
        print(f"{last // 5 + 1:5d}  {exponential[last]:14.4f}  {cumulative[last]:10.4f}")
    print(
        "The moving average forgets its start at 0 and then leans towards the latest batches (5, 4, ...).\n"
        "The plain mean is exactly 3 after every round, but would never forget what early, untrained\n"
        "weights made of the data: that is why training keeps a moving average."
    )


if __name__ == "__main__":
    main()
