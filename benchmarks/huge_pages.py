"""What huge pages for large outputs are worth: a training forward with and without them.

Memory that is used again has its pages already; after malloc_trim, which glibc calls by itself when enough is
free at the end of the heap, it has none. Each is timed in a process of its own, as advice stays with memory,
and over many rounds: a virtual machine's host may take milliseconds for a page that it has not given out yet.
"""

import ctypes
import math
import statistics
import subprocess
import sys
import time

import torch

import batchnorm as bn
from batchnorm.kernels.cpu import call
from batchnorm.lab.machine import machine_line

SHAPES = [(8, 64, 64, 64), (16, 64, 64, 64), (24, 64, 64, 64), (32, 64, 64, 64), (32, 64, 112, 112)]
ROUNDS = 600
trim = ctypes.CDLL(None).malloc_trim


def measure(shape: tuple[int, ...], huge: bool, trimmed: bool) -> float:
    """Milliseconds, in this process."""
    if not huge:
        call.in_huge_pages = lambda y: y
    layer, x = bn.BatchNorm2d(shape[1]), torch.randn(shape)
    times = []
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            if trimmed:
                trim(0)
            start = time.perf_counter()
            y = layer(x)
            times.append(time.perf_counter() - start)
            del y
    return statistics.median(times[1:]) * 1e3


def in_process(shape: tuple[int, ...], huge: bool, trimmed: bool) -> float:
    arguments = [",".join(map(str, shape)), str(int(huge)), str(int(trimmed))]
    run = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True)
    return float(run.stdout)


def compare(shape: tuple[int, ...], trimmed: bool) -> None:
    plain, huge_pages = (in_process(shape, huge, trimmed) for huge in (False, True))
    size, memory = math.prod(shape) / 2**18, "trimmed" if trimmed else "used again"
    ratio = plain / huge_pages
    print(f"{size:3.0f} MiB, {memory:<10}  {plain:6.2f} ms  {huge_pages:6.2f} ms in huge pages  {ratio:.2f}x")


def main() -> None:
    print(machine_line())
    for trimmed in (False, True):
        for shape in SHAPES:
            compare(shape, trimmed)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(tuple(map(int, sys.argv[1].split(","))), sys.argv[2] == "1", sys.argv[3] == "1"))
    else:
        main()
