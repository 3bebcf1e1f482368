"""Layers too small for the kernels, beside torch.nn's: with one shape, and with another at every call.

Microseconds a call of the forward, medians, in turn, and torch.nn's time over ours.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import batchnorm as bn
from batchnorm.lab.bench_probes import Contender, take_turns
from batchnorm.lab.bench_results import OURS, TORCH
from batchnorm.lab.machine import machine_line

SHAPES = [[(2, 17, 4, 4)], [(2, 48, 3, 4)], [(16, 16, 8, 8)], [(2, 16, 3, 4), (3, 16, 3, 4), (4, 16, 3, 4)]]
MODES = [(training, graph) for training in (False, True) for graph in (False, True)]
SECONDS = 1.0


def call(layer: torch.nn.Module, inputs: list[torch.Tensor]) -> Callable[[], Any]:
    turns = cycle(inputs)
    return lambda: layer(next(turns))


def measure(shapes: list[tuple[int, ...]], training: bool, graph: bool) -> list[str]:
    channels = shapes[0][1]
    inputs = [torch.randn(shape, requires_grad=graph) for shape in shapes]
    layers = {TORCH: torch.nn.BatchNorm2d(channels), OURS: bn.BatchNorm2d(channels)}
    with torch.set_grad_enabled(graph):
        times = take_turns(
            {name: Contender(call(layer.train(training), inputs)) for name, layer in layers.items()}, SECONDS
        )
    theirs, ours = times[TORCH].ms * 1e3, times[OURS].ms * 1e3
    names = ", ".join("x".join(map(str, shape)) for shape in shapes)
    mode = ("training" if training else "eval mode") + (", gradients" if graph else "")
    return [names, mode, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}"]


def main() -> None:
    table = Table("shape", "mode", TORCH, OURS, "ratio", box=None)
    for shapes in SHAPES:
        for training, graph in MODES:
            table.add_row(*measure(shapes, training, graph))
    console = Console()
    console.print(table)
    console.print(machine_line())


if __name__ == "__main__":
    main()
