"""Why the CPU kernels run on the OpenMP team of torch: steps of torch and our kernels, with one pool and two.

    python benchmarks/thread_pools.py

Each row is a fresh process, in turn; "two pools" gives our kernels a second copy of libgomp, as Numba's own
OpenMP layer would be. Prints the median milliseconds of a step (convolution and batch norm with ReLU, forward
and backward) per process, and the ratio of their medians.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import batchnorm
from batchnorm.kernels.cpu import team
from batchnorm.lab.machine import machine_line

ROUNDS, STEPS = 5, 60


def main() -> None:
    found: dict[str, list[float]] = {"one pool": [], "two pools": []}
    for _ in range(ROUNDS):
        for name, of_pool in found.items():
            answer = subprocess.run(
                [sys.executable, __file__, name], capture_output=True, text=True, check=True
            )
            of_pool.append(float(answer.stdout))
    for name, of_pool in found.items():
        print(f"{name:>10s}: {' '.join(f'{ms:6.2f}' for ms in of_pool)} ms a step")
    one, two = (statistics.median(of_pool) for of_pool in found.values())
    print(f"two pools take {two / one:.2f} times as long; {machine_line()}")


def step_milliseconds() -> float:
    """Median of one process."""
    model = nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1, bias=False), batchnorm.BatchNorm2d(32, activation="relu"),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), batchnorm.BatchNorm2d(32, activation="relu"),
    )  # fmt: skip
    x = torch.randn(16, 32, 28, 28)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(x).sum().backward()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def use_a_second_pool(folder: Path) -> None:
    """Give the kernels a copy of libgomp, which is another library to the loader."""
    copy = shutil.copy(team._loaded_libgomps()[0], folder / "libgomp-copy.so")
    library = ctypes.CDLL(copy)
    team._library = lambda: library  # type: ignore[assignment]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            if sys.argv[1] == "two pools":
                use_a_second_pool(Path(temporary))
            print(step_milliseconds())
