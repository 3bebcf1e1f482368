"""What a call of a layer costs outside its kernels, as the caches get colder.

    python benchmarks/cold_call.py

Before each call other memory is written, as a network's convolutions do. torch.nn's layer is on two values of
each channel, so that its time is the cost of a call, too. Microseconds, medians, in turn.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.kernels.cpu import team
from batchnorm.lab.machine import machine_line

CHANNELS, ROUNDS, WARM_UP = 512, 200, 20
MEGABYTES = (0, 8, 40)


def measure(megabytes: int) -> list[float]:
    """Forward and backward of ours, and of torch.nn's."""
    other = torch.ones(megabytes * 2**18 + 1)
    layers: list[tuple[nn.Module, Tensor]] = [
        (bn.BatchNorm2d(CHANNELS), torch.randn(8, CHANNELS, 7, 7)),
        (nn.BatchNorm2d(CHANNELS), torch.randn(2, CHANNELS, 1, 1)),
    ]
    times: list[list[float]] = [[], [], [], []]

    def timed(which: int, call: Callable[[], Tensor | None]) -> Tensor | None:
        other.add_(1)
        start = time.perf_counter()
        result = call()
        times[which].append(time.perf_counter() - start)
        return result

    for _ in range(ROUNDS):
        for i, (layer, values) in enumerate(layers):
            x, grad = values.requires_grad_(), values.detach()
            y = timed(2 * i, lambda layer=layer, x=x: layer(x))
            timed(2 * i + 1, lambda y=y, grad=grad: y.backward(grad))
            for tensor in (x, *layer.parameters()):
                tensor.grad = None
    return [statistics.median(of_call[WARM_UP:]) * 1e6 for of_call in times]


def main() -> None:
    assert team.available()
    bn.BatchNorm2d(CHANNELS)(torch.randn(8, CHANNELS, 7, 7))  # tries once whether the kernels work
    team.runner = lambda: lambda kernel, fields, threads, flags: None  # type: ignore[assignment]
    table = Table(box=None)
    table.add_column("MB written\nbefore", justify="right")
    for whose in ("ours", "torch.nn"):
        table.add_column(f"{whose},\nforward", justify="right")
        table.add_column(f"{whose},\nbackward", justify="right")
    for megabytes in MEGABYTES:
        table.add_row(str(megabytes), *(f"{value:.0f}" for value in measure(megabytes)))
    Console(width=110).print(table)
    print(machine_line())


if __name__ == "__main__":
    main()
