"""Whether a layer is ever slower than torch.nn's: on shapes, with activations, in modes by chance.

    python benchmarks/random_shapes.py --minutes 5 --seed 1

Beside torch's functions for the activation and the residual, in turn. A ratio below 0.95 is measured twice
more, and printed where the median of the three is; at the end, the geometric mean of all.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.lab.bench_probes import Contender, take_turns
from batchnorm.lab.machine import machine_line

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
}
SECONDS, NOISE = 0.1, 0.95


@dataclass(frozen=True)
class Case:
    """A layer, and what it is called on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    activation: str | None
    residual: bool
    training: bool
    gradients: bool

    def speedup(self) -> float:
        """torch.nn's time over ours."""
        torch.manual_seed(0)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x, residual, grad = (
            torch.randn(self.shape, dtype=self.dtype).contiguous(memory_format=layout) for _ in range(3)
        )
        inputs = [t.requires_grad_(self.gradients) for t in (x, residual)][: 1 + self.residual]
        name = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[x.ndim]
        theirs = getattr(nn, name)(x.shape[1], dtype=self.dtype).train(self.training)
        ours = getattr(bn, name)(x.shape[1], dtype=self.dtype, activation=self.activation)
        activation = ACTIVATIONS[self.activation]

        def by_torch(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = theirs(x)
            return activation(y if residual is None else y + residual)

        def contender(layer: Callable[..., Tensor], module: nn.Module) -> Contender:
            step = Contender.training(layer, inputs, grad if self.gradients else None)
            return Contender(step.call, [*inputs, *module.parameters()])

        contenders = {
            "torch": contender(by_torch, theirs),
            "ours": contender(ours.train(self.training), ours),
        }
        with torch.set_grad_enabled(self.gradients):
            found = take_turns(contenders, SECONDS)
        return found["torch"].ms / found["ours"].ms


def by_chance(chance: random.Random) -> Case:
    """Of 300 to 10 million values, with 1 to 2,048 channels."""
    spatial = chance.choice([0, 1, 2, 2, 2, 3])
    values, channels = 10 ** chance.uniform(2.5, 7), int(2 ** chance.uniform(0, 11))
    positions = 2 ** chance.uniform(0, math.log2(max(2, values / channels))) if spatial else 1
    sides = [max(1, round(positions ** (1 / spatial)) + chance.choice([0, 0, 1, -1])) for _ in range(spatial)]
    shape = max(2, int(values / channels / math.prod(sides))), channels, *sides
    return Case(
        shape,
        chance.choice([torch.float32] * 3 + [torch.float64]),
        spatial == 2 and chance.random() < 0.4,
        chance.choice([None, *ACTIVATIONS]),  # twice as often none as any other
        chance.random() < 0.25,
        chance.random() < 0.75,
        chance.random() < 0.75,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance, speedups, slower = random.Random(arguments.seed), [], 0
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end:
        case = by_chance(chance)
        speedups.append(case.speedup())
        if speedups[-1] < NOISE:
            again = statistics.median([speedups[-1], case.speedup(), case.speedup()])
            if again < NOISE:
                slower += 1
                print(f"{again:.2f}  {case}", flush=True)
    print(f"slower than torch.nn's: {slower} of {len(speedups):,} cases")
    print(f"times its speed: {statistics.geometric_mean(speedups):.2f} (geometric mean of all)")
    print(machine_line())


if __name__ == "__main__":
    main()
