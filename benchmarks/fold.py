"""How much faster inference is with batch norm folded: LeNet and ResNet-18, with torch.nn's layers and ours.

    python benchmarks/fold.py [SECONDS_PER_ROW]

Model and folded copy are timed in turn, in eval mode without gradients. The ratio is the median of the
rounds' ratios, between its quartiles: other work on the machine slows both sides of a round. The error is the
largest difference from the model in float64, relative to the largest output.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.lab.bench_nets import TAILS, ResNet18
from batchnorm.lab.bench_probes import Contender, gc_paused
from batchnorm.lab.bench_results import OURS, TORCH
from batchnorm.lab.machine import machine_line
from batchnorm.lab.nets import LeNet
from batchnorm.model import fold

SECONDS = 4.0
NORMS = {TORCH: "torch", OURS: "batchnorm"}


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    torch.manual_seed(0)
    print(f"{'':21}batch  {'model':>9} {'folded':>9}  {'ratio (quartiles)':19}  {'error':>7} {'unfolded':>8}")
    for layers in (TORCH, OURS):
        for batch in (1, 64):
            row(f"LeNet, {layers}", LeNet(NORMS[layers]), torch.randn(batch, 1, 28, 28), seconds)
        for batch in (1, 8):
            row(f"ResNet-18, {layers}", ResNet18(TAILS[layers]), torch.randn(batch, 3, 64, 64), seconds)
    print(f"images 28x28 and 64x64, {torch.get_num_threads()} threads; {machine_line()}")


def row(name: str, model: nn.Module, images: Tensor, seconds: float) -> None:
    season(model)
    model.eval()
    folded = fold(model, images)
    before, after = in_turn(*(Contender(partial(infer, one, images)) for one in (model, folded)), seconds)
    first, ratio, third = statistics.quantiles([b / a for b, a in zip(before, after, strict=True)], n=4)
    report = folded.fold_report
    print(
        f"{name:21}{len(images):5}  {1e3 * statistics.median(before):6.2f} ms "
        f"{1e3 * statistics.median(after):6.2f} ms  {ratio:4.2f} ({first:.2f} to {third:.2f})  "
        f"{report.error:7.1e} {report.error_unfolded:8.1e}"
    )


def in_turn(one: Contender, other: Contender, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of a call of each, in rounds whose order alternates."""
    times: tuple[list[float], list[float]] = ([], [])
    calls = max(round(2e-3 / max(one.seconds(2), 1e-6)), 1)  # small nets by the handful
    end = time.perf_counter() + seconds
    with gc_paused():
        while len(times[0]) < 5 or time.perf_counter() < end:
            order = (0, 1) if len(times[0]) % 2 else (1, 0)
            for index in order:
                times[index].append((one, other)[index].seconds(calls))
    return times


@torch.no_grad()
def infer(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


@torch.no_grad()
def season(model: nn.Module) -> None:
    """Batch norms as training leaves them, so that there is something to fold."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(0, 0.5)
            layer.running_mean.normal_(0, 0.5)
            layer.running_var.uniform_(0.5, 2)


if __name__ == "__main__":
    main()
