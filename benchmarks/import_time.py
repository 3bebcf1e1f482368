"""What `import batchnorm` adds to `import torch`, in fresh processes, in turn.

python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from batchnorm.lab.machine import machine_line

PROGRAM = """
import time
import torch
start = time.perf_counter()
import batchnorm
print(time.perf_counter() - start)
"""
ROUNDS = 9


def main() -> None:
    added = [
        float(subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True).stdout)
        for _ in range(ROUNDS)
    ]
    print(f"import batchnorm adds {statistics.median(added) * 1e3:.0f} ms (median of {ROUNDS} processes)")
    print(machine_line())


if __name__ == "__main__":
    main()
