"""What huge pages for large outputs are worth: a training forward with and without them, side by side."""

import statistics
import time

import torch

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import pages
from batchnorm.lab.machine import machine_line

SHAPES = [(8, 64, 64, 64), (16, 64, 64, 64), (32, 64, 64, 64), (32, 64, 112, 112), (32, 256, 56, 56)]


def main() -> None:
    print(machine_line())
    for shape in SHAPES:
        layer, x = bn.BatchNorm2d(shape[1]), torch.randn(shape)
        times: dict[object, list[float]] = {torch.empty_like: [], pages.empty_like: []}
        with torch.no_grad():
            for _ in range(15):
                for allocate, measured in times.items():
                    cpu.empty_like = allocate
                    start = time.perf_counter()
                    y = layer(x)
                    measured.append(time.perf_counter() - start)
                    del y
        plain, huge = (statistics.median(measured) for measured in times.values())
        size, ratio = x.numel() * x.element_size() / 2**20, plain / huge
        print(f"{size:5.0f} MiB  {plain * 1e3:6.2f} ms  {huge * 1e3:6.2f} ms in huge pages  {ratio:.2f}x")


if __name__ == "__main__":
    main()
