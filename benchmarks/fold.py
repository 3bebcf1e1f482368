"""How much faster inference is once batch norm is folded: LeNet and ResNet-18, with torch.nn's layers and ours.

    python benchmarks/fold.py [SECONDS_PER_ROW]

Model and folded copy are timed in turn, on all threads, in eval mode without gradients; the ratio is that of
the medians. The error is the largest difference from the model in float64, relative to the largest output.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.lab.bench import OURS, TORCH
from batchnorm.lab.bench_nets import TAILS, ResNet18
from batchnorm.lab.bench_probes import Contender, take_turns
from batchnorm.lab.machine import machine_line
from batchnorm.lab.nets import LeNet
from batchnorm.model import fold

SECONDS = 4.0
NORMS = {TORCH: "torch", OURS: "batchnorm"}


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    torch.manual_seed(0)
    print(f"{'':26}{'batch':>5}  {'model':>9} {'folded':>9}  {'ratio':>5}  {'error':>7} {'unfolded':>8}")
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
    contenders = {
        "model": Contender(partial(infer, model, images)),
        "folded": Contender(partial(infer, folded, images)),
    }
    timings = take_turns(contenders, seconds)
    before, after = timings["model"].ms, timings["folded"].ms
    report = folded.fold_report
    print(
        f"{name:26}{len(images):5}  {before:6.2f} ms {after:6.2f} ms  {before / after:5.2f}  "
        f"{report.error:7.1e} {report.error_unfolded:8.1e}"
    )


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
