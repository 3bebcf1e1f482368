"""What it is worth that a backward writes over a gradient that nobody else holds: the steps of a ResNet-18.

Beside the same network without batch norm, with torch.nn's, and with ours in new memory only.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels import autograd
from batchnorm.kernels.holders import has_no_other_holder
from batchnorm.lab.bench_nets import NO_NORM, TAILS, ResNet18
from batchnorm.lab.bench_probes import Contender, take_turns
from batchnorm.lab.bench_results import OURS, TORCH
from batchnorm.lab.machine import machine_line

IMAGES = [(16, 64), (16, 128), (16, 224), (32, 224)]
IN_NEW_MEMORY = "ours in new memory"
SECONDS = 120


def contenders(batch: int, size: int) -> dict[str, Contender]:
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    def step(model: torch.nn.Module, look: Callable[[Tensor], bool]) -> Callable[[], None]:
        def run() -> None:
            autograd.has_no_other_holder = look
            F.cross_entropy(model(images), labels).backward()

        return run

    found = {}
    for name, tail in TAILS.items():
        model = ResNet18(tail)
        found[name] = Contender(step(model, has_no_other_holder), list(model.parameters()))
    found[IN_NEW_MEMORY] = Contender(step(model, lambda gradient: False), list(model.parameters()))
    return found


def main() -> None:
    print(machine_line())
    print("images              without batch norm     torch.nn             in new memory        ours")
    for batch, size in IMAGES:
        times = take_turns(contenders(batch, size), SECONDS)
        columns = "".join(
            f"  {times[name].ms:7.1f} ms ({times[name].ms / times[NO_NORM].ms:.3f})"
            for name in (NO_NORM, TORCH, IN_NEW_MEMORY, OURS)
        )
        print(f"{f'{batch}x3x{size}x{size}':<14}{columns}", flush=True)


if __name__ == "__main__":
    main()
