"""What synchronised batch norm costs on a network: messages, bytes and seconds of its collectives, on paper.

A collective of p processes takes `call + latencies of its messages + bytes sent * seconds per byte`, the
alpha-beta model (Hockney 1994), with the counts of Thakur, Rabenseifner and Gropp, "Optimization of
collective communication operations in MPICH", 2005. With several processes in a node, a ring goes through
each node once and a tree joins nodes, within which it is a chain, as in NCCL (`src/graph/tuning.cc`, whose
latencies stand here too).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

FLOAT32, FLOAT64 = 4, 8


class Network(NamedTuple):
    """Seconds that communication takes.

    Attributes:
        name: to print.
        call: of a collective, whatever its size: the launch.
        near: latency of a message between processes of one node.
        far: latency of a message between nodes.
        per_byte: of the slowest link a process sends over.
        per_node: processes of a node.
    """

    name: str
    call: float
    near: float
    far: float
    per_byte: float
    per_node: int = 1


# Assumptions, not measurements. Calls and latencies: NCCL's table for its low-latency protocol (base 3.6 and
# 4.4 us, NVLink 0.47 and 0.52, network 2.7 and 5.0 for ring and tree). Bandwidth of a process: the data
# sheets' 450 GB/s each way of NVLink 4, 400 Gb/s of InfiniBand NDR, 25 Gb/s of Ethernet. Latency of TCP in a
# data centre: 30 us, a usual value.
NVLINK = Network("NVLink, one node", 4e-6, 0.5e-6, 0.5e-6, 1 / 450e9)
INFINIBAND = Network("nodes of 8 on InfiniBand", 4e-6, 0.5e-6, 3e-6, 1 / 50e9, per_node=8)
ETHERNET = Network("25 Gb/s Ethernet", 4e-6, 30e-6, 30e-6, 8 / 25e9)


class Cost(NamedTuple):
    """What one process does in a collective, or in several, one after the other.

    Attributes:
        calls: collectives.
        near: messages within a node that wait for each other.
        far: messages between nodes that wait for each other.
        sent: bytes.
    """

    calls: int
    near: int
    far: int
    sent: float

    def seconds(self, network: Network) -> float:
        """`calls * network.call + near * network.near + far * network.far + sent * network.per_byte`."""
        latencies = self.near * network.near + self.far * network.far
        return self.calls * network.call + latencies + self.sent * network.per_byte


Collective = Callable[[int, int, int], Cost]


def ring_all_reduce(processes: int, size: int, per_node: int = 1) -> Cost:
    """`2 (p-1)` messages of `size / p` bytes: a ring that adds, and one that hands the sums on."""
    return Cost(1, *_twice(_ring_messages(processes, per_node)), 2 * (processes - 1) / processes * size)


def tree_all_reduce(processes: int, size: int, per_node: int = 1) -> Cost:
    """`2 log2(nodes)` messages up and down a tree; each process sends what it does in a ring (two trees)."""
    return Cost(1, *_twice(_tree_messages(processes, per_node)), 2 * (processes - 1) / processes * size)


def ring_all_gather(processes: int, size: int, per_node: int = 1) -> Cost:
    """`p-1` messages of `size` bytes, the contribution of one process."""
    return Cost(1, *_ring_messages(processes, per_node), (processes - 1) * size)


def tree_all_gather(processes: int, size: int, per_node: int = 1) -> Cost:
    """`log2(nodes)` messages that double in size: the same bytes, few latencies."""
    return Cost(1, *_tree_messages(processes, per_node), (processes - 1) * size)


def _ring_messages(processes: int, per_node: int) -> tuple[int, int]:
    """How many messages, near and far, lie between a number and the last process it reaches."""
    far = math.ceil(processes / per_node) - 1
    return processes - 1 - far, far


def _tree_messages(processes: int, per_node: int) -> tuple[int, int]:
    nodes = math.ceil(processes / per_node)
    return min(processes, per_node) - 1, math.ceil(math.log2(nodes))


def _twice(messages: tuple[int, int]) -> tuple[int, int]:
    return 2 * messages[0], 2 * messages[1]


def ours(
    channels: Sequence[int], processes: int, per_node: int = 1, all_reduce: Collective = tree_all_reduce
) -> Cost:
    """A step of our layers: an all-reduce of 2C+1 float64 forward, and of 2C backward, for each.

    Args:
        channels: C of each layer.
        processes: that synchronise.
        per_node: of which so many share a node.
        all_reduce: the algorithm.
    """
    return _sum(
        cost
        for c in channels
        for cost in (
            all_reduce(processes, FLOAT64 * (2 * c + 1), per_node),
            all_reduce(processes, FLOAT64 * 2 * c, per_node),
        )
    )


def gathering(
    channels: Sequence[int],
    processes: int,
    per_node: int = 1,
    all_gather: Collective = ring_all_gather,
    all_reduce: Collective = tree_all_reduce,
) -> Cost:
    """A step of `torch.nn.SyncBatchNorm`: it gathers 2C+1 float32 of each process, and adds 2C backward.

    Source: `torch/nn/modules/_functions.py` of torch 2.13. Arguments as for `ours`.
    """
    return _sum(
        cost
        for c in channels
        for cost in (
            all_gather(processes, FLOAT32 * (2 * c + 1), per_node),
            all_reduce(processes, FLOAT32 * 2 * c, per_node),
        )
    )


def _sum(costs: Iterable[Cost]) -> Cost:
    return Cost(*(sum(column) for column in zip(*costs, strict=True)))


def resnet50_channels() -> list[int]:
    """Of the 53 batch norms of ResNet-50 (He et al. 2015, table 1), in the order of its modules."""
    channels = [64]
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        block = [width, width, 4 * width]
        channels += [*block, 4 * width] + (blocks - 1) * block  # the first has a shortcut with one
    return channels


def fit(name: str, measured: Sequence[tuple[Cost, float]]) -> Network:
    """The network of single processes that explains the `measured` seconds best, by relative error.

    Least squares with no negative time: calls, latencies and bytes are told apart only by collectives that
    differ in all three.
    """
    seconds = np.array([time for _, time in measured])
    counts = np.array([(cost.calls, cost.near + cost.far, cost.sent) for cost, _ in measured], dtype=float)
    scale = counts.max(0)
    (call, latency, per_byte), _ = nnls(counts / scale / seconds[:, None], np.ones(len(seconds)))
    return Network(name, call / scale[0], latency / scale[1], latency / scale[1], per_byte / scale[2])


def noise_of_statistics(values: float) -> tuple[float, float]:
    """Relative standard errors of mean (in standard deviations) and variance, of independent normal values.

    Formula: `1 / sqrt(n)` and `sqrt(2 / (n - 1))`.
    """
    return 1 / math.sqrt(values), math.sqrt(2 / (values - 1))
