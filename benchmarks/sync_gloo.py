"""How long the collectives of synchronised batch norm take over gloo on this machine, and by the model.

    python benchmarks/sync_gloo.py

All-reduces and gathers, single ones and those of a step of ResNet-50, by 2, 3 and 4 processes in turn. The
model is `batchnorm.lab.sync_cost`, fitted to the times of 2. Result: the end of benchmarks/sync_scale.txt.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from ranks import found_by_ranks, one_of_them
from torch import Tensor

from batchnorm.lab import sync_cost
from batchnorm.lab.machine import machine_line
from batchnorm.lab.sync_cost import Cost, gathering, ours

CHANNELS = sync_cost.resnet50_channels()
# Of one all-reduce or gather; the last is wider than any layer, to tell bytes from messages.
WIDTHS = (64, 2048, 65_536)
MEASURED_PROCESSES = (2, 3, 4)
ROUNDS, SECONDS = 30, 150


class Timed(NamedTuple):
    """Seconds of a case, summed over its calls: of their fastest deciles (little disturbed) and medians."""

    fast: float
    median: float


def show_measured() -> None:
    """Fit the network to 2 processes, and hold what it predicts for more against their times."""
    measured = {p: time_processes(p) for p in MEASURED_PROCESSES}
    single = [name for name in cases(2) if not name.startswith("step")]
    loopback = sync_cost.fit("loopback", [(counted(name, 2), measured[2][name].fast) for name in single])
    print(
        f"gloo over loopback on this machine, fitted to 2 processes: {1e6 * loopback.call:.0f} us a call, "
        f"{1e6 * loopback.far:.0f} us a message, {1e-9 / loopback.per_byte:.2f} GB/s"
    )
    print("(torch.nn.SyncBatchNorm refuses CPUs: its collectives are timed, without its kernels)")
    print(f"microseconds by the model / fastest decile / median of {ROUNDS} rounds, of the slowest process:")
    print(f"{'':26s}" + "".join(f"{f'{p} processes':>28s}" for p in MEASURED_PROCESSES))
    for name in cases(2):
        print(f"{name:26s}", end="")
        for p in MEASURED_PROCESSES:
            model, timed = counted(name, p).seconds(loopback), measured[p][name]
            print(f"{1e6 * model:10,.0f}/{1e6 * timed.fast:8,.0f}/{1e6 * timed.median:8,.0f}", end="")
        print()
    print("a step of ours / one that gathers, by the model, fastest decile, median:")
    for p in MEASURED_PROCESSES:
        ratio = counted(STEP_OURS, p).seconds(loopback) / counted(STEP_GATHER, p).seconds(loopback)
        mine, theirs = measured[p][STEP_OURS], measured[p][STEP_GATHER]
        print(
            f"  {p} processes: {ratio:.2f}, {mine.fast / theirs.fast:.2f}, {mine.median / theirs.median:.2f}"
        )
    print(machine_line())


Call = Callable[[], object]
STEP_OURS, STEP_GATHER = "step of ResNet-50, ours", "step of ResNet-50, gather"


def cases(processes: int) -> dict[str, list[Call]]:
    """What is timed, by name: single collectives, and those of a step of ResNet-50."""
    found: dict[str, list[Call]] = {}
    for c in WIDTHS:
        found[f"all-reduce, {c} channels"] = [all_reduce(2 * c + 1, torch.float64)]
        found[f"gather, {c} channels"] = [all_gather(2 * c + 1, processes)]
    found[STEP_OURS], found[STEP_GATHER] = [], []
    for c in CHANNELS:
        found[STEP_OURS] += [all_reduce(2 * c + 1, torch.float64), all_reduce(2 * c, torch.float64)]
        found[STEP_GATHER] += [all_gather(2 * c + 1, processes), all_reduce(2 * c, torch.float32)]
    return found


def counted(name: str, processes: int) -> Cost:
    """The cost of a case by the model, with the rings that gloo uses."""
    ring = sync_cost.ring_all_reduce
    if name == STEP_OURS:
        return ours(CHANNELS, processes, all_reduce=ring)
    if name == STEP_GATHER:
        return gathering(CHANNELS, processes, all_reduce=ring)
    numbers = 2 * int(name.split()[1]) + 1
    if name.startswith("gather"):
        return sync_cost.ring_all_gather(processes, sync_cost.FLOAT32 * numbers)
    return ring(processes, sync_cost.FLOAT64 * numbers)


def all_reduce(numbers: int, dtype: torch.dtype) -> Call:
    sums = torch.zeros(numbers, dtype=dtype)
    return lambda: dist.all_reduce(sums)


def all_gather(numbers: int, processes: int) -> Call:
    own = torch.zeros(numbers)
    of_all: list[Tensor] = [torch.empty(numbers) for _ in range(processes)]
    return lambda: dist.all_gather(of_all, own)


def time_processes(processes: int) -> dict[str, Timed]:
    """Of the slowest of so many processes."""
    of_ranks = found_by_ranks(__file__, processes, SECONDS)
    return {
        name: Timed(*(max(column) for column in zip(*(found[name] for found in of_ranks), strict=True)))
        for name in of_ranks[0]
    }


def measure(arguments: list[str]) -> None:
    """One of the processes: time the cases in turn."""
    with one_of_them(arguments, SECONDS) as (processes, found):
        timed = cases(processes)
        seconds: dict[str, list[list[float]]] = {name: [] for name in timed}
        for _ in range(ROUNDS + 3):
            for name, calls in timed.items():
                dist.barrier()
                seconds[name].append([duration(call) for call in calls])
        found |= {name: summary(rounds[3:]) for name, rounds in seconds.items()}


def duration(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summary(rounds: list[list[float]]) -> Timed:
    of_calls = [sorted(times) for times in zip(*rounds, strict=True)]
    return Timed(
        sum(times[len(times) // 10] for times in of_calls),
        sum(statistics.median(times) for times in of_calls),
    )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        show_measured()
    else:
        measure(sys.argv[1:])
