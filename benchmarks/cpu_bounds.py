"""How near to memory the CPU kernels are: the ratios of `batchnorm bench` beside what copies allow.

    batchnorm bench --json bench.json
    python benchmarks/cpu_bounds.py bench.json

Each bound is torch.nn's time over that of moving tensors as fast as the floor does (a geometric mean over the
shapes that the benchmark's own summary takes): each tensor once; those that two passes read twice, too; and
that with the cost of a call, which is our time on the smallest shape.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from batchnorm.lab.bench_cases import CASES, Case
from batchnorm.lab.bench_results import FLOOR, LARGE, OURS, TORCH


def bounds(case: Case, results: list[dict[str, Any]]) -> list[float]:
    """Ours, and the three bounds."""
    times = {name: [r["timings"][name]["ms"] for r in results] for name in (TORCH, OURS, FLOOR)}
    call = min(times[OURS])
    large = [i for i, result in enumerate(results) if math.prod(result["shape"]) >= LARGE]
    copied = 5 if case.backward else 2
    # x in the forward; x and a gradient in the backward.
    read_again = 3 if case.backward else 1

    def mean(ms: list[float]) -> float:
        return statistics.geometric_mean(times[TORCH][i] / ms[i] for i in large)

    once = [ms * case.tensors / copied for ms in times[FLOOR]]
    twice = [ms * (case.tensors + read_again) / copied for ms in times[FLOOR]]
    return [mean(times[OURS]), mean(once), mean(twice), mean([ms + call for ms in twice])]


def main(path: Path) -> None:
    benchmark = json.loads(path.read_text())
    table = Table(box=None)
    table.add_column("torch.nn's time over that of", no_wrap=True)
    for name in ("ours", "all moved\nonce", "by two\npasses", "by two passes,\nand a call"):
        table.add_column(name, justify="right")
    for name, case in CASES.items():
        results = [result for result in benchmark["results"] if result["case"] == name]
        if results:
            table.add_row(name, *(f"{bound:.2f}" for bound in bounds(case, results)))
    Console(width=110).print(table)
    print(f"{benchmark['machine']['processor']}, {benchmark['threads']} threads")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
