"""recalibrate on Fashion-MNIST: its time, the accuracy before and after, and torch's update_bn beside it.

    python benchmarks/recalibrate.py --data-dir ../shared/data

Trains a LeNet by the tutorial's recipe at batch 4, by default 5 epochs of 10,000 images, about a minute;
`--train-samples 60000` is the whole recipe, some 5 minutes. Then gives it the statistics of 10,000 training
images.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from batchnorm.lab.data import Dataset
from batchnorm.lab.evaluate import test_accuracy
from batchnorm.lab.machine import machine_line
from batchnorm.lab.recipes import configure
from batchnorm.lab.train import Training, load_dataset
from batchnorm.model import recalibrate

SAMPLES = 10_000


def show_uneven_batches() -> None:
    """Batches of 40 and 24 through a linear layer, dropout and a batch norm: errors of the statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.BatchNorm1d(8))
    batches = [torch.randn(40, 16) + 20, torch.randn(24, 16) - 20]
    with torch.no_grad():
        seen = model[0](torch.cat(batches)).double()
    print("Linear, Dropout, BatchNorm1d; batches of 40 and 24 (largest error of the mean, of the variance):")
    for name, verb in (
        ("update_bn", lambda: update_bn(batches, model)),
        ("recalibrate", lambda: recalibrate(model, batches)),
    ):
        verb()
        mean = (model[2].running_mean - seen.mean(0)).abs().max()
        var = (model[2].running_var / seen.var(0) - 1).abs().max()
        print(f"  {name:12s} mean off by {mean:.2g}, variance by {var:.2g} of itself")


def show_trained(training: Training) -> None:
    """Train, with a line for each epoch."""
    config = training.config
    print(f"LeNet, batch {config.batch_size}, {len(training.dataset.train_labels):,} images an epoch:")
    while not training.finished:
        result = training.run_epoch()
        print(
            f"  epoch {result.epoch}: loss {result.loss:.4f}, accuracy {result.accuracy:.4f}, "
            f"{result.seconds:.0f} s",
            flush=True,
        )


def show_time(model: nn.Module, images: Tensor, batch_size: int) -> None:
    """Seconds of recalibrating a LeNet, medians of three after one to warm up."""
    wall, cpu = [], []
    for _ in range(4):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        recalibrate(model, images.split(batch_size))
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    print(
        f"{len(images):,} images, batch {batch_size}: {statistics.median(wall[1:]):.2f} s "
        f"({statistics.median(cpu[1:]):.2f} s of CPU time), {torch.get_num_threads()} threads"
    )


def show_accuracy(trained: nn.Module, data: Dataset, batch_size: int) -> None:
    """Of copies of the trained model with their statistics taken in several ways."""
    images = data.train_images[:SAMPLES]

    def of(name: str, change: Callable[[nn.Module], object]) -> None:
        model = copy.deepcopy(trained)
        change(model)
        print(f"  {name:44s} {test_accuracy(model, data):.4f}")

    print(
        f"accuracy on {len(data.test_labels):,} test images, statistics of {len(images):,} training images:"
    )
    of("before: running average", lambda model: None)
    of("recalibrate, batch 1000", lambda model: recalibrate(model, images.split(1000)))
    of("recalibrate, sequential", lambda model: recalibrate(model, images.split(1000), sequential=True))
    of(
        f"recalibrate, batch {batch_size}, as in training",
        lambda model: recalibrate(model, images.split(batch_size)),
    )
    of("torch's update_bn, batch 1000", lambda model: update_bn(images.split(1000), model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train-samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    show_uneven_batches()
    all_threads = torch.get_num_threads()
    config = configure(
        "fashion-mnist",
        "tutorial",
        batch_size=options.batch_size,
        epochs=options.epochs,
        seed=options.seed,
        train_samples=options.train_samples,
    )
    data = load_dataset(config, options.data_dir)
    training = Training(config, data)
    show_trained(training)
    torch.set_num_threads(all_threads)
    for batch_size in (100, 1000):
        show_time(copy.deepcopy(training.model), data.train_images[:SAMPLES], batch_size)
    show_accuracy(training.model, data, options.batch_size)
    print(machine_line())


if __name__ == "__main__":
    main()
