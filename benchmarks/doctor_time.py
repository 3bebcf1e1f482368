"""How long the doctor takes for a ResNet-50: without data, and with 8 batches of 32x3x64x64 on 2 threads.

Run from the repository root:

    python -m benchmarks.doctor_time
"""

from __future__ import annotations

import time

import torch

import batchnorm as bn
from batchnorm.lab.machine import machine_line
from tests.doctor.test_diagnose import resnet50

BATCHES, SHAPE, THREADS = 8, (32, 3, 64, 64), 2


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = resnet50()
    images = [torch.randn(SHAPE) for _ in range(BATCHES)]
    for data in (None, images):
        start = time.perf_counter()
        bn.diagnose(model, data)
        what = "without data" if data is None else f"{BATCHES} batches of {'x'.join(map(str, SHAPE))}"
        print(f"ResNet-50, {what}: {time.perf_counter() - start:.2f} s at {THREADS} threads")
    print(machine_line())


if __name__ == "__main__":
    main()
