"""RESULT

    python benchmarks/sync_scale.py > benchmarks/sync_scale.txt

Prints the model's tables for the 53 batch norms of ResNet-50, and beside times of 2, 3 and 4 gloo processes on this
machine what the model, fitted to the times of 2, predicts. `--figure docs/sync-at-scale.png` draws it.
"""

from __future__ import annotations

import argparse
import io
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
from typing import NamedTuple

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from batchnorm.lab import sync_cost
from batchnorm.lab.files import write_atomically
from batchnorm.lab.machine import machine_line
from batchnorm.lab.sync_cost import ETHERNET, INFINIBAND, Cost, Network, gathering, ours

CHANNELS = sync_cost.resnet50_channels()
SCALE = (2, 4, 8, 16, 64, 256, 1_024, 4_096, 16_384, 100_000)
# An assumption to hold the milliseconds against: a GPU that trains ResNet-50 in mixed precision.
IMAGES_PER_SECOND, STEP_IMAGES = 2_500, (32, 256)
# Error of ImageNet's validation for ResNet-50 by images per statistics: Wu & He, "Group normalization", 2018, table 2.
IMAGENET_ERROR = {2: 34.7, 4: 27.3, 8: 24.8, 16: 23.7, 32: 23.6}

# Of one all-reduce or gather; the last is wider than any layer, to tell bytes from messages.
WIDTHS = (64, 2048, 65_536)
MEASURED_PROCESSES = (2, 3, 4)
ROUNDS, SECONDS = 30, 150


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
        f"{1e6 * network.near:g} and {1e6 * network.far:g} us\na message in and between nodes, "
        f"{1e-9 / network.per_byte:g} GB/s); flat: a tree that does not know which processes share a node:"
    )
    columns = {way: (way, network) for way in WAYS}
    if network.per_node > 1:
        columns["ours, flat"] = ("ours, tree", network._replace(per_node=1))
    print(f"{'processes':>11s} " + " ".join(f"{name:>13s}" for name in columns))
    for p in SCALE:
        cells = (milliseconds(way, p, known) for way, known in columns.values())
        print(f"{p:11,d} " + " ".join(f"{ms:13,.2f}" for ms in cells))
    print()


def show_thresholds() -> None:
    """The number of processes from which on communication is this much of a step."""
    print(
        f"processes from which on it is more than 10% and 100% of a step at {IMAGES_PER_SECOND:,} images/s (assumed):"
    )
    headings = [f"{share:.0%} of {images} images" for images in STEP_IMAGES for share in (0.1, 1)]
    print(f"{'':40s}" + " ".join(f"{heading:>18s}" for heading in headings))
    for network in (INFINIBAND, ETHERNET):
        for way in WAYS:
            limits = [
                1e3 * share * images / IMAGES_PER_SECOND for images in STEP_IMAGES for share in (0.1, 1)
            ]
            found = (first_above(way, network, ms) for ms in limits)
            print(f"{network.name:26s}{way:14s}" + " ".join(f"{p:>18s}" for p in found))
    print()


def first_above(way: str, network: Network, ms: float) -> str:
    """By bisection: the cost does not fall as processes are added."""
    low, high = 1, SCALE[-1]
    if milliseconds(way, high, network) <= ms:
        return "never"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if milliseconds(way, middle, network) > ms else (middle, high)
    return f"{high:,}"


def show_groups() -> None:
    """What more processes in a group buy, and what they cost."""
    print(
        "images behind a statistic: standard errors if an image were one independent value; published error:"
    )
    print(f"{'images':>11s} {'mean/deviation':>15s} {'variance':>9s} {'ImageNet':>9s}")
    for images in (2, 4, 8, 16, 32, 64, 128, 512, 8192):
        mean, variance = sync_cost.noise_of_statistics(images)
        error = f"{IMAGENET_ERROR[images]:.1f}%" if images in IMAGENET_ERROR else "-"
        print(f"{images:11,d} {mean:15.1%} {variance:9.1%} {error:>9s}")
    print("processes to synchronise for 32 images behind a statistic, nodes of 8 on InfiniBand:")
    for batch in (1, 2, 4, 8, 16):
        print(
            f"  batch {batch:2d}: {32 // batch:2d} processes, {milliseconds('ours, tree', 32 // batch, INFINIBAND):.2f} ms a step"
        )
    print()


class Timed(NamedTuple):
    """Seconds of a case: its calls, each at its fastest decile, which others disturb little, and at its median."""

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
    print(
        f"microseconds by the model / fastest decile / median of {ROUNDS} rounds in turn, of the slowest process:"
    )
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
    return {name: Timed(*map(max, zip(*(found[name] for found in of_ranks)))) for name in of_ranks[0]}


def measure(rank: int, processes: int, folder: Path) -> None:
    """One of the processes: time the cases in turn, and leave the medians in the folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=SECONDS)
    )
    timed = cases(processes)
    seconds: dict[str, list[list[float]]] = {name: [] for name in timed}
    for _ in range(ROUNDS + 3):
        for name, calls in timed.items():
            dist.barrier()
            seconds[name].append([duration(call) for call in calls])
    times = {name: summary(found[3:]) for name, found in seconds.items()}
    (folder / f"{rank}.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


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


# Okabe & Ito's colors, and a line style each, for whoever sees no colors.
STYLES = {
    "ours, ring": ("#009E73", "--"),
    "ours, tree": ("#009E73", "-"),
    "gather, ring": ("#D55E00", "--"),
    "gather, tree": ("#D55E00", "-"),
}


def picture() -> bytes:
    """Time and bytes of a step against the number of processes, as PNG."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    seconds, sent = figure.subplots(1, 2)
    scale = [2**k for k in range(1, 17)] + [SCALE[-1]]
    for way, (color, style) in STYLES.items():
        ms = [milliseconds(way, p, INFINIBAND) for p in scale]
        seconds.loglog(scale, ms, style, color=color, linewidth=2)
        seconds.annotate(
            way, (scale[-1], ms[-1]), (5, 0), textcoords="offset points", color=color, va="center"
        )
    for images in STEP_IMAGES:
        ms_of_step = 1e3 * images / IMAGES_PER_SECOND
        seconds.axhline(ms_of_step, color="#888888", linewidth=0.8)
        seconds.text(2, 1.1 * ms_of_step, f"computing {images} images (assumed)", color="#555555", fontsize=8)
    group = milliseconds("ours, tree", INFINIBAND.per_node, INFINIBAND)
    seconds.plot([8, scale[-1]], [group, group], ":", color="#0072B2", linewidth=2)
    seconds.annotate(
        "ours, groups of 8",
        (scale[-1], group),
        (5, 0),
        textcoords="offset points",
        color="#0072B2",
        va="center",
    )
    seconds.set_title("ms of communication in a step, nodes of 8 on InfiniBand", loc="left", fontsize=10)
    for name, way in (("ours", "ours, tree"), ("gather", "gather, ring")):
        megabytes = [WAYS[way](p, 1).sent / 1e6 for p in scale]
        color = STYLES[way][0]
        sent.loglog(scale, megabytes, "-", color=color, linewidth=2)
        sent.annotate(
            name, (scale[-1], megabytes[-1]), (5, 0), textcoords="offset points", color=color, va="center"
        )
    sent.set_title("MB that a process sends in a step", loc="left", fontsize=10)
    for axes in (seconds, sent):
        axes.set_xlabel("processes")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda p, _: f"{p:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("The 53 synchronised batch norms of ResNet-50, on paper")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
