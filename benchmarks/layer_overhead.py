"""Eager forward + backward of batchnorm's layers beside torch.nn's, in turn, over small and large shapes.

    python benchmarks/layer_overhead.py

Prints the median of each and their ratio; above 1 ours is slower.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.lab.machine import machine_line

SHAPES: list[tuple[int, ...]] = [
    (4, 120), (16, 84), (256, 120), (4096, 1024),
    (32, 64, 1000),
    (4, 6, 24, 24), (4, 16, 8, 8), (16, 16, 8, 8), (128, 6, 24, 24), (1024, 16, 8, 8),
    (8, 64, 112, 112), (8, 256, 56, 56), (32, 64, 56, 56), (32, 512, 7, 7),
    (2, 32, 16, 28, 28),
]  # fmt: skip
SECONDS_PER_SHAPE = 2.0


def main() -> None:
    print(f"{'shape':>20s}  {'torch.nn':>10s}  {'batchnorm':>10s}  ratio")
    ratios = []
    for shape in SHAPES:
        theirs, mine = measure(shape)
        ratios.append(mine / theirs)
        print(f"{shape!s:>20s}  {theirs * 1e6:8.1f} us  {mine * 1e6:8.1f} us  {ratios[-1]:5.2f}")
    print(f"geometric mean {statistics.geometric_mean(ratios):.3f}, worst {max(ratios):.3f}")
    print(f"medians, in turn; {machine_line()}")


def measure(shape: tuple[int, ...]) -> tuple[float, float]:
    """Median seconds of torch.nn's layer and of ours."""
    name = f"BatchNorm{max(len(shape) - 2, 1)}d"
    x, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
    layers = [getattr(nn, name)(shape[1]), getattr(batchnorm, name)(shape[1])]
    seconds: list[list[float]] = [[], []]
    for layer in layers:
        timed(layer, x, gradient)
    end = time.perf_counter() + SECONDS_PER_SHAPE
    while time.perf_counter() < end:
        for layer, of_layer in zip(layers, seconds, strict=True):
            of_layer.append(timed(layer, x, gradient))
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def timed(layer: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    layer(x).backward(gradient)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
