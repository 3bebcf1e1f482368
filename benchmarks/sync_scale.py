"""What communication costs synchronised batch norm with 2 to 100,000 processes: ours, and a gather, on paper.

    python benchmarks/sync_scale.py [--figure docs/sync-at-scale.png]

Bytes, milliseconds on two assumed networks, when that is much of a step, what sub-groups cost; then the model
beside gloo on this machine. Result: benchmarks/sync_scale.txt, discussed in docs/sync-at-scale.md.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from sync_gloo import show_measured

from batchnorm.files import write_atomically
from batchnorm.lab import sync_cost
from batchnorm.lab.sync_cost import ETHERNET, INFINIBAND, Cost, Network, gathering, ours

CHANNELS = sync_cost.resnet50_channels()
SCALE = (2, 4, 8, 16, 64, 256, 1_024, 4_096, 16_384, 100_000)
# An assumption to hold the milliseconds against: a GPU that trains ResNet-50 in mixed precision.
IMAGES_PER_SECOND, STEP_IMAGES = 2_500, (32, 256)
# Validation error of ResNet-50 by images per statistics: Wu & He, "Group normalization", 2018, table 2.
IMAGENET_ERROR = {2: 34.7, 4: 27.3, 8: 24.8, 16: 23.7, 32: 23.6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, help="write a PNG of the model here")
    options = parser.parse_args()
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
        "processes from which on it is more than 10% and 100% of a step, at "
        f"{IMAGES_PER_SECOND:,} images/s (assumed):"
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
        group = 32 // batch
        ms = milliseconds("ours, tree", group, INFINIBAND)
        print(f"  batch {batch:2d}: {group:2d} processes, {ms:.2f} ms a step")
    print()


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
        seconds.text(2, 1.1 * ms_of_step, f"computing {images} images", color="#555555", fontsize=8)
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
