"""Where the time of a training step of BatchNorm2d + ReLU on the CPU goes, beside copies of the same memory.

Microseconds, medians, in turn. `kernel`: the compiled code alone; `layer`: with checks, plan and autograd.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import fields, team
from batchnorm.lab.machine import machine_line

SHAPES = [
    (8, 512, 7, 7),
    (8, 256, 14, 14),
    (8, 64, 56, 56),
    (1024, 16, 8, 8),
    (32, 256, 14, 14),
    (32, 2048, 7, 7),
    (32, 64, 56, 56),
    (32, 64, 112, 112),
]
SECONDS = 1.5


def pieces(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    x, grad = torch.randn(2, *shape)
    watched = x.clone().requires_grad_()
    layer, theirs = bn.BatchNorm2d(shape[1], activation="relu"), torch.nn.BatchNorm2d(shape[1])
    weight, bias = layer.weight.detach(), layer.bias.detach()
    call = cpu.Call(x, 1, fields.OF_BATCH, layer.eps, "relu", None)

    def kernel_forward() -> object:
        return call.forward(x, weight, bias, None)

    def layer_step() -> None:
        watched.grad = None
        layer(watched).backward(grad)

    def their_step() -> None:
        watched.grad = None
        torch.relu(theirs(watched)).backward(grad)

    return {
        "x.clone()": x.clone,
        "forward,\nkernel": kernel_forward,
        "forward,\nlayer": lambda: layer(watched),
        "x + g": lambda: x + grad,
        "backward,\nkernel": lambda: call.backward(grad, x, None, (True, True, True, False)),
        "both,\nlayer": layer_step,
        "both,\ntorch.nn": their_step,
    }


def medians(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()  # compiles
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for name, function in functions.items():
            start = time.perf_counter()
            result = function()
            times[name].append(time.perf_counter() - start)
            del result
    return {name: statistics.median(measured) * 1e6 for name, measured in times.items()}


def main() -> None:
    assert team.available()
    table = Table(box=None)
    rows = {shape: medians(pieces(shape)) for shape in SHAPES}
    table.add_column("shape", no_wrap=True)
    for name in rows[SHAPES[0]]:
        table.add_column(name, justify="right", min_width=7)
    for shape, row in rows.items():
        table.add_row("x".join(map(str, shape)), *(f"{value:,.0f}" for value in row.values()))
    Console(width=100).print(table, machine_line(), sep="\n")


if __name__ == "__main__":
    main()
