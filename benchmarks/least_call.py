"""How fast a layer could be that asks nothing: the kernels in an autograd function, with a plan made ahead.

    python benchmarks/least_call.py

It runs one shape, activation and mode, computes what the layer computes, and is wrong for anything else. What
it cannot do without is autograd's, Python's and the allocator's. torch.nn's time over ours and over its, and
both over the floor, for a training step; medians, in turn, as in `batchnorm bench`.
"""

import math
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, empty_like, nn

import batchnorm as bn
from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu import launch
from batchnorm.kernels.cpu.plan import plan_of
from batchnorm.lab import bench
from batchnorm.lab.bench_cases import CASES, Case
from batchnorm.lab.bench_probes import Contender, take_turns
from batchnorm.lab.machine import machine_line

SHAPES = [
    (8, 64, 56, 56),
    (8, 256, 28, 28),
    (8, 1024, 14, 14),
    (32, 256, 14, 14),
    (8, 128, 28, 28),
    (8, 512, 14, 14),
    (8, 2048, 7, 7),
    (8, 128, 56, 56),
    (32, 512, 14, 14),
    (32, 64, 56, 56),
    (1024, 16, 8, 8),
]
MEASURED = ("forward+backward", "forward+backward residual relu")
SECONDS = 1.0


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, layer: "LeastLayer"
    ) -> Tensor:
        plan, y = layer.plan, empty_like(x)
        ctx.layer, ctx.table = layer, empty_like(plan.table)
        bits = None if residual is None else empty_like(plan.bits)
        launch.run_forward(
            plan, ctx.table, x, y, residual, f.OF_BATCH, plan.count, weight, bias,
            layer.running, 1e-5, layer.activation, bits,
        )  # fmt: skip
        if bits is None:
            ctx.save_for_backward(x)
        else:
            ctx.save_for_backward(x, bits)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        layer, (x, *rest) = ctx.layer, ctx.saved_tensors
        grad_x, grad_residual = empty_like(x), empty_like(x) if rest else None
        grad_weight, grad_bias = empty_like(layer.plan.parameter), empty_like(layer.plan.parameter)
        launch.run_backward(
            layer.plan, ctx.table, x, rest[0] if rest else None, grad_y, grad_x, grad_residual,
            grad_weight, grad_bias, None, None, True, True, layer.activation, "bits" if rest else "x",
        )  # fmt: skip
        return grad_x, grad_weight, grad_bias, grad_residual, None


_apply = super(torch.autograd.Function, _Normalise).apply


class LeastLayer(nn.Module):
    """For inputs like x alone."""

    def __init__(self, x: Tensor, activation: str | None) -> None:
        super().__init__()
        channels = x.shape[1]
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.statistics = torch.zeros(channels), torch.ones(channels), torch.zeros((), dtype=torch.int64)
        self.running = (*(tensor.data_ptr() for tensor in self.statistics), 0.1)
        self.activation = activation
        plan = plan_of(x, 1)
        assert plan is not None
        self.plan = plan

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        parameters = self._parameters
        return _apply(x, parameters["weight"], parameters["bias"], residual, self)


def outcome(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = layer(*leaves)
    return [y, *torch.autograd.grad(y, [*leaves, *layer.parameters()], gradient)]


def measure(case: Case, shape: tuple[int, ...]) -> dict[str, float]:
    theirs, ours = bench.layers(case, shape)
    inputs, gradient = bench.data(case, shape)
    assert isinstance(ours, bn.BatchNorm2d)
    assert gradient is not None
    least, x = LeastLayer(inputs[0], case.activation), inputs[0].detach()
    pairs = zip(outcome(ours, inputs, gradient), outcome(least, inputs, gradient), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    layers = {"torch": theirs, "ours": ours, "least": least}
    contenders = {name: Contender.training(layer, inputs, gradient) for name, layer in layers.items()}
    contenders["floor"] = Contender(lambda: (x.clone(), x + gradient))
    return {name: timing.ms for name, timing in take_turns(contenders, SECONDS).items()}


def main() -> None:
    table = Table(box=None)
    for heading in ("", "torch/\nours", "torch/\nleast call", "ours/\nfloor", "least call/\nfloor"):
        table.add_column(heading, justify="right" if heading else "left")
    pairs = [(CASES[name], shape) for name in MEASURED for shape in SHAPES]
    found = {(case.name, shape): measure(case, shape) for case, shape in track(pairs, transient=True)}
    for name in MEASURED:
        rows = {shape: found[name, shape] for shape in SHAPES}
        ratios = [
            [ms[over] / ms[under] for ms in rows.values()]
            for over, under in (("torch", "ours"), ("torch", "least"), ("ours", "floor"), ("least", "floor"))
        ]
        table.add_row(name)
        for i, shape in enumerate(rows):
            table.add_row(f"  {'x'.join(map(str, shape))}", *(f"{column[i]:.2f}" for column in ratios))
        means = (math.exp(sum(map(math.log, column)) / len(column)) for column in ratios)
        table.add_row("  geometric mean", *(f"{mean:.2f}" for mean in means))
    Console(width=110).print(table)
    print(machine_line())


if __name__ == "__main__":
    main()
