"""What huge pages for large outputs are worth: a training forward with and without them, in turn.

Memory that is used again has its pages already; after malloc_trim, which glibc calls by itself when enough is
free at the end of the heap, it has none.
"""

import ctypes
import statistics
import time

import torch

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import pages
from batchnorm.lab.machine import machine_line

SHAPES = [(8, 64, 64, 64), (16, 64, 64, 64), (24, 64, 64, 64), (32, 64, 64, 64), (32, 64, 112, 112)]
trim = ctypes.CDLL(None).malloc_trim


def compare(shape: tuple[int, ...], trimmed: bool) -> None:
    layer, x = bn.BatchNorm2d(shape[1]), torch.randn(shape)
    times: dict[object, list[float]] = {torch.empty_like: [], pages.empty_in_huge_pages: []}
    with torch.no_grad():
        for _ in range(15):
            for allocate, measured in times.items():
                cpu.empty_in_huge_pages = allocate
                if trimmed:
                    trim(0)
                start = time.perf_counter()
                y = layer(x)
                measured.append(time.perf_counter() - start)
                del y
    plain, huge = (statistics.median(measured) * 1e3 for measured in times.values())
    size, memory = x.numel() * x.element_size() / 2**20, "trimmed" if trimmed else "used again"
    ratio = plain / huge
    print(f"{size:3.0f} MiB, {memory:<10}  {plain:6.2f} ms  {huge:6.2f} ms in huge pages  {ratio:.2f}x")


def main() -> None:
    print(machine_line())
    for trimmed in (False, True):
        for shape in SHAPES:
            compare(shape, trimmed)


if __name__ == "__main__":
    main()
