"""How wide a tile of channels the CPU kernels should take of contiguous inputs: forward and backward by size.

A small tile stays in a cache between the kernels' passes; a large one is read and written in long stretches
of memory, sample by sample. Before each step other memory is written, as a network's convolutions do.
Nanoseconds a value, medians, all sizes in turn.
"""

import importlib
import random
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

import batchnorm as bn
from batchnorm.lab.machine import machine_line

SHAPES = [
    (8, 64, 56, 56),
    (8, 128, 56, 56),
    (32, 512, 14, 14),
    (32, 64, 56, 56),
    (8, 256, 56, 56),
    (32, 256, 56, 56),
    (32, 256, 28, 28),
    (8, 512, 7, 7),
]
KIB_OF_A_SAMPLE = (16, 32, 64, 96, 128, 256, 1024)
ROUNDS = 40

# The package has a function of the module's name.
plan = importlib.import_module("batchnorm.kernels.cpu.plan")


def seconds(layer: bn.BatchNorm2d, x: torch.Tensor, grad: torch.Tensor) -> tuple[float, float]:
    x.grad = None
    start = time.perf_counter()
    y = layer(x)
    between = time.perf_counter()
    y.backward(grad)
    return between - start, time.perf_counter() - between


def compare(shape: tuple[int, ...]) -> list[str]:
    x, grad = torch.randn(shape).requires_grad_(), torch.randn(shape)
    layers = {kib: bn.BatchNorm2d(shape[1]) for kib in KIB_OF_A_SAMPLE}  # each keeps its plan
    other = torch.ones(12_000_000)
    times: dict[int, list[tuple[float, float]]] = {kib: [] for kib in KIB_OF_A_SAMPLE}
    for _ in range(ROUNDS + 1):
        for kib in random.sample(KIB_OF_A_SAMPLE, len(KIB_OF_A_SAMPLE)):
            plan._TILE_BYTES = plan._TILE_BYTES_OF_CACHED = kib * 1024
            plan.plan.cache_clear()
            other.add_(1)
            times[kib].append(seconds(layers[kib], x, grad))
    columns = []
    for measured in times.values():
        parts = zip(*measured[1:], strict=True)
        columns.append(" ".join(f"{statistics.median(part) / x.numel() * 1e9:5.2f}" for part in parts))
    return columns


def main() -> None:
    table = Table("shape", *[f"{kib} KiB" for kib in KIB_OF_A_SAMPLE], box=None)
    for shape in SHAPES:
        table.add_row("x".join(map(str, shape)), *compare(shape))
    Console(width=120, highlight=False).print(table)
    print(machine_line())


if __name__ == "__main__":
    main()
