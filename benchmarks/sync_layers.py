"""How long synchronised layers take, with kernels around the all-reduces and without, beside those alone.

Two processes with a thread each, over gloo; the layers take turns. `python benchmarks/sync_layers.py SOURCES`
times the layers of another version too, by its `src` folder, in rounds between those of this one.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from ranks import found_by_ranks, one_of_them
from torch import Tensor

import batchnorm as bn
from batchnorm.kernels import reference
from batchnorm.lab.machine import machine_line

PROCESSES, ROUNDS, STEPS, SECONDS = 2, 3, 25, 120
SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7)]
CASES = [(shape, last, residual) for shape in SHAPES for last in (False, True) for residual in (False, True)]
HERE = str(Path(bn.__file__).parents[1])


def show(sources: list[str]) -> None:
    """The table: microseconds of the fastest tenth, and ratios."""
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {source: [] for source in sources}
    for _ in range(ROUNDS):
        for source, found in rounds.items():
            found.append(time_processes(source))
    best = {
        source: {
            case: {kind: min(of[case][kind] for of in found) for kind in found[0][case]} for case in found[0]
        }
        for source, found in rounds.items()
    }
    print(f"{'us, forward + backward with ReLU':40s}{'alone':>9s}{'sync':>9s}{'sync by':>9s}", end="")
    print(f"{'torch /':>9s}{'sync /':>9s}" + "".join(f"{'other':>9s}{'other /':>9s}" for _ in sources[1:]))
    print(f"{'':40s}{'':9s}{'':9s}{'torch':>9s}{'sync':>9s}{'alone':>9s}", end="")
    print("".join(f"{'':9s}{'sync':>9s}" for _ in sources[1:]))
    for case, times in best[HERE].items():
        alone, ours, by_torch = (1e6 * times[kind] for kind in ("alone", "sync", "by torch"))
        print(f"{case:40s}{alone:9,.0f}{ours:9,.0f}{by_torch:9,.0f}", end="")
        print(f"{by_torch / ours:9.2f}{ours / alone:9.2f}", end="")
        for source in sources[1:]:
            other = 1e6 * best[source][case]["sync"]
            print(f"{other:9,.0f}{other / ours:9.2f}", end="")
        print()
    print(machine_line())


def time_processes(source: str) -> dict[str, dict[str, float]]:
    """Of the slowest process, by case and kind of layer."""
    ranks = found_by_ranks(__file__, PROCESSES, SECONDS, PYTHONPATH=source)
    return {
        case: {kind: max(of[case][kind] for of in ranks) for kind in times}
        for case, times in ranks[0].items()
    }


def measure(arguments: list[str]) -> None:
    """One of the processes: seconds by case and kind of layer."""
    with one_of_them(arguments, SECONDS) as (_, found):
        for shape, last, with_residual in CASES:
            name = "x".join(map(str, shape)) + " channels_last" * last + " + residual" * with_residual
            found[name] = of_case(shape, last, with_residual)


def of_case(shape: tuple[int, ...], last: bool, with_residual: bool) -> dict[str, float]:
    """Seconds by kind of layer, of the fastest tenth; the layers take turns."""
    layout = torch.channels_last if last else torch.contiguous_format
    x, residual, grad = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(3))
    leaves = [x.requires_grad_(), residual.requires_grad_()][: 1 + with_residual]
    layers = {
        "alone": bn.BatchNorm2d(shape[1], activation="relu"),
        "sync": bn.BatchNorm2d(shape[1], activation="relu", sync=True),
        "by torch": bn.BatchNorm2d(shape[1], activation="relu", sync=True),
    }
    times: dict[str, list[float]] = {kind: [] for kind in layers}
    for _ in range(STEPS + 2):
        for kind, layer in layers.items():
            times[kind].append(step(layer, leaves, grad, kind == "by torch"))
    return {kind: statistics.quantiles(of[2:], n=10)[0] for kind, of in times.items()}


def step(layer: torch.nn.Module, leaves: list[Tensor], grad: Tensor, by_torch: bool) -> float:
    for leaf in (*leaves, *layer.parameters()):
        leaf.grad = None
    dist.barrier()
    start = time.perf_counter()
    if by_torch and hasattr(bn, "synchronised"):
        with mock.patch("batchnorm.synchronised.choose", return_value=reference):
            layer(*leaves).backward(grad)
    else:
        layer(*leaves).backward(grad)
    return time.perf_counter() - start


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].isdecimal():
        measure(sys.argv[1:])
    else:
        show([HERE, *sys.argv[1:]])
