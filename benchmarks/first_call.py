"""How long the first forward and backward of a process take, with an empty cache folder and a full one."""

import os
import subprocess
import sys
import tempfile

from batchnorm.lab.machine import machine_line

# One shape for each way through memory: slabs, groups, rows; contiguous and channels_last.
SHAPES = {
    "slabs": (16, 64, 28, 28),
    "groups": (64, 512, 4, 4),
    "rows": (4096, 1024),
    "channels_last": (16, 64, 28, 28),
}
STEP = """
import sys, time, torch, batchnorm
shape, last = tuple(map(int, sys.argv[1].split(","))), sys.argv[2] == "channels_last"
layer = (batchnorm.BatchNorm2d if len(shape) == 4 else batchnorm.BatchNorm1d)(shape[1], activation="relu")
x = torch.randn(shape)
x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
start = time.perf_counter()
layer(x).sum().backward()
print(time.perf_counter() - start)
"""


def first_call(shape: tuple[int, ...], name: str, cache: str) -> float:
    command = [sys.executable, "-c", STEP, ",".join(map(str, shape)), name]
    environment = {**os.environ, "BATCHNORM_CACHE": cache}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    print(machine_line())
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = first_call(shape, name, cache), first_call(shape, name, cache)
        print(f"{name:<14} cold {cold:5.2f} s   warm {warm * 1e3:4.0f} ms")


if __name__ == "__main__":
    main()
