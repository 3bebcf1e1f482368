"""An epoch of the tutorial's own loop beside an epoch of `batchnorm train`, in turn, on Fashion-MNIST.

    python benchmarks/epoch.py --data-dir ../shared/data

The tutorial's loop: a Dataset and a DataLoader with 2 workers, torch.nn's layers, Adam, `loss.item()`
every step. Ours: the same network with batchnorm's layers, as `batchnorm train` runs it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from batchnorm.lab.data import Dataset
from batchnorm.lab.machine import machine_line
from batchnorm.lab.nets import LeNet
from batchnorm.lab.recipes import configure
from batchnorm.lab.train import Training, load_dataset


class Images(TorchDataset):
    """One image and its label at a time, by the steps of torchvision's FashionMNIST with ToTensor().

    (torchvision itself is not needed for it.)
    """

    def __init__(self, data: Dataset) -> None:
        self.images = (data.train_images * 255).round().to(torch.uint8)[:, 0]
        self.labels = data.train_labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index].numpy())
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).view(28, 28, 1)
        return pixels.permute(2, 0, 1).contiguous().float().div(255), int(self.labels[index])


class TutorialLoop:
    """The tutorial's training loop."""

    def __init__(self, data: Dataset, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model = LeNet("torch")
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.batches = DataLoader(Images(data), batch_size, shuffle=True, num_workers=2)

    def run_epoch(self) -> float:
        """Seconds of an epoch."""
        start = time.perf_counter()
        loss_of = nn.CrossEntropyLoss()
        total = 0.0
        self.model.train()
        for images, labels in self.batches:
            loss = loss_of(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    all_threads = torch.get_num_threads()
    config = configure("fashion-mnist", "tutorial", batch_size=options.batch_size)
    data = load_dataset(config, options.data_dir)
    tutorial, ours = TutorialLoop(data, options.batch_size), Training(config, data)
    theirs, mine = [], []
    for _ in range(options.rounds):
        torch.set_num_threads(all_threads)
        theirs.append(tutorial.run_epoch())
        torch.set_num_threads(config.threads)
        mine.append(ours.run_epoch().seconds)
    for name, seconds in (("tutorial's loop", theirs), ("batchnorm train", mine)):
        rounds = ", ".join(f"{value:.1f}" for value in seconds)
        print(f"{name:16s} {statistics.median(seconds):6.1f} s an epoch   ({rounds})")
    print(f"ratio            {statistics.median(mine) / statistics.median(theirs):6.2f}")
    print(f"batch {options.batch_size}, {options.rounds} rounds in turn, medians; {machine_line()}")


if __name__ == "__main__":
    main()
