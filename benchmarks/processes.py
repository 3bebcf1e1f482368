"""LeNet's loss curve in several processes with --sync beside that of one process, over 100 steps.

    torchrun --nproc-per-node 2 benchmarks/processes.py [--data fashion-mnist]

Batches of 64 in all, the tutorial's recipe. Rounding grows along a training run, so beside it stand runs of
one process that begin with one weight moved by one unit in its last place. Result: docs/processes.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from batchnorm.lab.data import DATASETS, Dataset
from batchnorm.lab.processes import ALONE, World, joined, parallel
from batchnorm.lab.recipes import Config, configure
from batchnorm.lab.train import Training, load_dataset

STEPS, MOVED = 100, 5


def curve(config: Config, data: Dataset, world: World = ALONE, moved: int | None = None) -> Tensor:
    """The loss of every step; `moved` is the weight that begins one unit in the last place higher."""
    training = Training(config, data, world)
    if moved is not None:
        weights = training.model.conv[0].weight.data.view(-1)
        weights[moved] = torch.nextafter(weights[moved], weights.new_tensor(torch.inf))
    if not world.alone:
        training._parallel = parallel(training.model)
    training.model.train()
    losses: list[Tensor] = []
    while len(losses) < STEPS:
        order = torch.randperm(len(data.train_labels), generator=training.shuffling)
        for images, labels, samples in training._batches(order):
            losses.append(training._step(images, labels, samples))
    return world.add(torch.stack(losses[:STEPS]).double())


def difference(losses: Tensor, one: Tensor) -> str:
    """The largest relative difference in the first 20 steps, and in all."""
    relative = (losses - one).abs() / one.abs()
    return f"{relative[:20].max():.1e} in 20 steps, {relative.max():.1e} in {len(one)}"


def main() -> None:
    """Print the differences, for float32 and float64."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="fashion-mnist", choices=DATASETS)
    arguments = parser.parse_args()
    with joined() as world:
        for dtype in ("float32", "float64"):
            config = configure(
                arguments.data,
                batch_size=64,
                schedule="constant",
                sync=True,
                dtype=dtype,
                threads=1,
                train_samples=64 * STEPS,
                test_samples=1,
            )
            data = load_dataset(config)
            several = curve(config, data, world)
            if world.rank == 0:
                alone = replace(config, sync=False)
                one = curve(alone, data)
                print(f"{dtype}: loss {one[0]:.4f} to {one[-1]:.4f}")
                print(f"  {world.size} processes:     {difference(several, one)}")
                for moved in range(MOVED):
                    print(f"  a unit in weight {moved}: {difference(curve(alone, data, moved=moved), one)}")


if __name__ == "__main__":
    main()
