"""How near to memory the CPU kernels are: the ratios of `batchnorm bench` beside what copies allow.

    batchnorm bench --json bench.json
    python benchmarks/cpu_bounds.py bench.json

Each bound is torch.nn's time over that of moving tensors as fast as the floor does (a geometric mean over the
shapes that the benchmark's own summary takes): each tensor once; those that two passes read twice, too; and
that with the cost of a call, which is our time on the smallest shape. Then the same for our time over the
floor's, for the shapes that the benchmark gives it for.
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
from batchnorm.lab.bench_results import FLOOR, HUGE, LARGE, OURS, TORCH

# Tensors that the floor reads and writes, and those of them that a layer's second passes read again.
FORWARD, BACKWARD = (2, 1), (5, 3)


def bounds(case: Case, results: list[dict[str, Any]]) -> list[float]:
    """Ours, and the three bounds."""
    times = {name: [r["timings"][name]["ms"] for r in results] for name in (TORCH, OURS, FLOOR)}
    call = min(times[OURS])
    large = [i for i, result in enumerate(results) if math.prod(result["shape"]) >= LARGE]
    copied, read_again = BACKWARD if case.backward else FORWARD
    # Bits tell the slope here, which the output tells on a GPU.
    tensors = case.tensors - (case.residual and case.backward)

    def mean(ms: list[float]) -> float:
        return statistics.geometric_mean(times[TORCH][i] / ms[i] for i in large)

    once = [ms * tensors / copied for ms in times[FLOOR]]
    twice = [ms * (tensors + read_again) / copied for ms in times[FLOOR]]
    return [mean(times[OURS]), mean(once), mean(twice), mean([ms + call for ms in twice])]


def over_floor(results: list[dict[str, Any]]) -> str:
    """Of plain forward and backward."""
    call = min(result["timings"][OURS]["ms"] for result in results)
    copied, read_again = BACKWARD
    ours, bound = {}, {}
    for result in results:
        if math.prod(result["shape"]) >= HUGE:
            shape, floor = "x".join(map(str, result["shape"])), result["timings"][FLOOR]["ms"]
            ours[shape] = result["timings"][OURS]["ms"] / floor
            bound[shape] = (copied + read_again) / copied + call / floor

    def line(name: str, ratios: dict[str, float]) -> str:
        mean, worst = statistics.geometric_mean(ratios.values()), max(ratios, key=lambda shape: ratios[shape])
        return f"{name}: mean {mean:.2f}, worst {ratios[worst]:.2f} on {worst}"

    return f"over the floor, {line('ours', ours)}; {line('by two passes, and a call', bound)}"


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
    plain = [result for result in benchmark["results"] if result["case"] == "forward+backward"]
    if plain:
        print(over_floor(plain))
    print(f"{benchmark['machine']['processor']}, {benchmark['threads']} threads")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
