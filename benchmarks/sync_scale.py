"""RESULT

    python benchmarks/sync_scale.py > benchmarks/sync_scale.txt

Prints the model's tables for the 53 batch norms of ResNet-50, and beside times of 2, 3 and 4 gloo processes on this
machine what the model, fitted to the times of 2, predicts. `--figure docs/sync-at-scale.png` draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.lab import sync_cost
from batchnorm.lab.files import write_atomically
from batchnorm.lab.machine import machine_line
from batchnorm.lab.sync_cost import ETHERNET, INFINIBAND, NVLINK, Cost, Network, gathering, ours

CHANNELS = sync_cost.resnet50_channels()
SCALE = (2, 4, 8, 16, 64, 256, 1_024, 4_096, 16_384, 100_000)
# An assumption to hold the milliseconds against: 32 images for a GPU that trains on 2,500 a second.
STEP_SECONDS = 32 / 2500
# Error of ImageNet's validation for ResNet-50 by images per statistics: Wu & He, "Group normalization", 2018, table 2.
IMAGENET_ERROR = {2: 34.7, 4: 27.3, 8: 24.8, 16: 23.7, 32: 23.6}

# Of one all-reduce or gather; the last is wider than any layer, to tell bytes from messages.
WIDTHS = (64, 512, 2048, 65_536)
MEASURED_PROCESSES = (2, 3, 4)
ROUNDS, SECONDS = 60, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, help="write a PNG of the model here")
    parser.add_argument("--rank", nargs=3, metavar=("RANK", "PROCESSES", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        measure(int(options.rank[0]), int(options.rank[1]), Path(options.rank[2]))
        return
    show_bytes()
    for network in (INFINIBAND, ETHERNET):
        show_seconds(network)
    show_thresholds()
    show_groups()
    show_measured()
    if options.figure:
        write_atomically(options.figure, picture())


def show_bytes() -> None:
    print("kB that a process sends in a step of ResNet-50 (53 layers, forward and backward):")
    print(f"{'processes':>11s} {'ours':>10s} {'gather':>13s} {'gather/ours':>12s}")
    for p in SCALE:
        by_us, gathered = ours(CHANNELS, p).sent, gathering(CHANNELS, p).sent
        print(f"{p:11,d} {by_us / 1e3:10,.0f} {gathered / 1e3:13,.0f} {gathered / by_us:12,.2f}")
    print()


# What is compared, and the name of each in the tables and the figure.
WAYS: dict[str, Callable[[int, int], Cost]] = {
    "ours, ring": lambda p, node: ours(CHANNELS, p, node, sync_cost.ring_all_reduce),
    "ours, tree": lambda p, node: ours(CHANNELS, p, node),
    "gather, ring": lambda p, node: gathering(CHANNELS, p, node),
    "gather, tree": lambda p, node: gathering(CHANNELS, p, node, sync_cost.tree_all_gather),
}


def milliseconds(way: str, processes: int, network: Network) -> float:
    return 1e3 * WAYS[way](processes, network.per_node).seconds(network)


def show_seconds(network: Network) -> None:
    print(
        f"ms of communication in a step, {network.name} (assumed: {1e6 * network.call:g} us a call, "
        f"{1e6 * network.near:g} and {1e6 * network.far:g} us a message in and between nodes, "
        f"{1e-9 / network.per_byte:g} GB/s):"
    )
    flat = network._replace(per_node=1)
    columns = {way: (way, network) for way in WAYS}
    if network.per_node > 1:
        columns["ours, tree that does not know nodes"] = ("ours, tree", flat)
    print(f"{'processes':>11s} " + " ".join(f"{name:>12s}" for name in columns))
    for p in SCALE:
        cells = (milliseconds(way, p, known) for way, known in columns.values())
        print(
            f"{p:11,d} "
            + " ".join(f"{ms:{max(12, len(name))},.2f}" for ms, name in zip(cells, columns, strict=True))
        )
    print()


def show_thresholds() -> None:
    """The number of processes from which on communication is a tenth of a step."""
    print(
        f"processes from which on it is more than 10% of a step of {1e3 * STEP_SECONDS:.1f} ms (assumed: 32 images at 2,500/s):"
    )
    for network in (INFINIBAND, ETHERNET):
        for way in WAYS:
            print(f"  {network.name:26s} {way:14s} {first_above(way, network, 100 * STEP_SECONDS)}")
    print()


def first_above(way: str, network: Network, ms: float) -> str:
    """By bisection: the cost does not fall as processes are added."""
    low, high = 1, 100_000
    if milliseconds(way, high, network) <= ms:
        return f"none up to {high:,}"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if milliseconds(way, middle, network) > ms else (middle, high)
    return f"{high:,}"


def show_groups() -> None:
    """What more processes in a group buy, and what they cost."""
    print(
        "images behind a statistic, its noise with one independent value an image, published error of ResNet-50:"
    )
    for images in (2, 4, 8, 16, 32, 64, 128, 512, 8192):
        mean, variance = sync_cost.noise_of_statistics(images)
        error = f"{IMAGENET_ERROR[images]:.1f}%" if images in IMAGENET_ERROR else "-"
        print(f"{images:11,d} mean {mean:6.1%} of a deviation, variance {variance:6.1%}   {error}")
    print("processes to synchronise for 32 images, and ms a step within a node of NVLink:")
    for batch in (1, 2, 4, 8, 16, 32):
        group = 32 // batch
        ms = milliseconds("ours, tree", group, NVLINK._replace(per_node=8) if group <= 8 else INFINIBAND)
        print(f"  batch {batch:2d}: {group:2d} processes, {ms if group > 1 else 0:.2f} ms")
    print()


# Of each number of processes, the median seconds of each case by name.
Measured = dict[int, dict[str, float]]


def show_measured() -> None:
    """Fit the network to 2 processes, and hold what it predicts for more against their times."""
    measured = {p: median_seconds(p) for p in MEASURED_PROCESSES}
    single = [name for name in cases(2) if not name.startswith("step")]
    loopback = sync_cost.fit("gloo", [(counted(name, 2), measured[2][name]) for name in single])
    print(
        f"gloo over loopback on this machine, fitted to 2 processes: {1e6 * loopback.call:.0f} us a call, "
        f"{1e6 * loopback.far:.0f} us a message, {1e-9 / loopback.per_byte:.2f} GB/s"
    )
    print("torch.nn.SyncBatchNorm refuses CPUs: its collectives alone are timed, without its kernels.")
    print(f"microseconds, medians of {ROUNDS} rounds in turn, the slowest process; model / measured:")
    print(f"{'':28s}" + "".join(f"{f'{p} processes':>24s}" for p in MEASURED_PROCESSES))
    for name in cases(2):
        print(f"{name:28s}", end="")
        for p in MEASURED_PROCESSES:
            model, found = counted(name, p).seconds(loopback), measured[p][name]
            print(f"{1e6 * model:9,.0f}/{1e6 * found:7,.0f} {model / found:5.2f} ", end="")
        print()
    print(machine_line())


def cases(processes: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name: single collectives, and those of a step of ResNet-50."""
    found: dict[str, Callable[[], object]] = {}
    for c in WIDTHS:
        found[f"all-reduce, {c} channels"] = all_reduce(2 * c + 1, torch.float64)
        found[f"gather, {c} channels"] = all_gather(2 * c + 1, processes)
    steps = {
        "ours": [call for c in CHANNELS for call in (all_reduce(2 * c + 1, torch.float64), all_reduce(2 * c, torch.float64))],
        "gather": [call for c in CHANNELS for call in (all_gather(2 * c + 1, processes), all_reduce(2 * c, torch.float32))],
    }  # fmt: skip
    for name, calls in steps.items():
        found[f"step of ResNet-50, {name}"] = lambda calls=calls: [call() for call in calls]
    return found


def counted(name: str, processes: int) -> Cost:
    """The cost of a case by the model, with the rings that gloo uses."""
    ring = sync_cost.ring_all_reduce
    if name.startswith("step"):
        if name.endswith("ours"):
            return ours(CHANNELS, processes, all_reduce=ring)
        return gathering(CHANNELS, processes, all_reduce=ring)
    numbers = 2 * int(name.split()[1]) + 1
    if name.startswith("gather"):
        return sync_cost.ring_all_gather(processes, sync_cost.FLOAT32 * numbers)
    return ring(processes, sync_cost.FLOAT64 * numbers)


def all_reduce(numbers: int, dtype: torch.dtype) -> Callable[[], object]:
    sums = torch.zeros(numbers, dtype=dtype)
    return lambda: dist.all_reduce(sums)


def all_gather(numbers: int, processes: int) -> Callable[[], object]:
    own = torch.zeros(numbers)
    of_all: list[Tensor] = [torch.empty(numbers) for _ in range(processes)]
    return lambda: dist.all_gather(of_all, own)


def median_seconds(processes: int) -> dict[str, float]:
    """Of the slowest of so many processes, which end with this function whatever happens."""
    children: list[subprocess.Popen[bytes]] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(processes):
                command = [sys.executable, __file__, "--rank", str(rank), str(processes), folder]
                children.append(subprocess.Popen(command, env=environment, start_new_session=True))
            deadline = time.monotonic() + SECONDS
            for child in children:
                if child.wait(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"one of {processes} processes failed: its error is above")
        finally:
            for child in children:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        of_ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]
    return {name: max(found[name] for found in of_ranks) for name in of_ranks[0]}


def measure(rank: int, processes: int, folder: Path) -> None:
    """One of the processes: time the cases in turn, and leave the medians in the folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=SECONDS)
    )
    timed = cases(processes)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(ROUNDS + 5):
        for name, run in timed.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found[5:]) for name, found in seconds.items()}
    (folder / f"{rank}.json").write_text(json.dumps(medians))
    dist.barrier()
    dist.destroy_process_group()


def picture() -> bytes:
    return b""


if __name__ == "__main__":
    main()
