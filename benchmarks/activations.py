"""Each fused activation: torch.nn's time for batch norm and the activation over ours, forward and backward.

    python benchmarks/activations.py

Medians, in turn.
"""

import random
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.kernels.autograd import FUSED
from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.lab.machine import machine_line

CASES = [
    ((8, 64, 56, 56), torch.contiguous_format),
    ((8, 64, 56, 56), torch.channels_last),
    ((64, 32, 8, 8), torch.contiguous_format),
    ((4096, 256), torch.contiguous_format),
]
DTYPES = (torch.float32, torch.float64)
ROUNDS, WARM_UP = 40, 5


class Activated(nn.Module):
    def __init__(self, norm: nn.Module, activation: str) -> None:
        super().__init__()
        self.norm, self.activation = norm, ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(x))


def ratio(name: str, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> float:
    """torch.nn's time over ours."""
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn_like(x)
    ours, theirs = (bn.BatchNorm2d, nn.BatchNorm2d) if len(shape) == 4 else (bn.BatchNorm1d, nn.BatchNorm1d)
    layers: dict[str, nn.Module] = {
        "ours": ours(shape[1], activation=name, dtype=dtype),
        "torch": Activated(theirs(shape[1], dtype=dtype), name),
    }
    times: dict[str, list[float]] = {which: [] for which in layers}
    for _ in range(ROUNDS + WARM_UP):
        for which in random.sample(list(layers), len(layers)):
            times[which].append(step(layers[which], x, grad))
    medians = {which: statistics.median(measured[WARM_UP:]) for which, measured in times.items()}
    return medians["torch"] / medians["ours"]


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> float:
    x.grad = None
    start = time.perf_counter()
    layer(x).backward(grad)
    return time.perf_counter() - start


def main() -> None:
    table = Table(box=None)
    table.add_column("torch.nn / ours")
    for shape, layout in CASES:
        last = "\nchannels_last" if layout == torch.channels_last else "\n"
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            table.add_column(f"{'x'.join(map(str, shape))}{last}\n{name}", justify="right")
    for name in sorted(filter(None, FUSED)):
        table.add_row(name, *(f"{ratio(name, *case, dtype):.2f}" for case in CASES for dtype in DTYPES))
    Console(width=130).print(table)
    print(machine_line())


if __name__ == "__main__":
    main()
