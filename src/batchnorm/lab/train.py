"""Training a LeNet, from top to bottom: model, optimizer, epoch, test; resumable at every epoch.

In several processes each takes its part of every batch: the batches, their order and the gradients, of the
mean loss over the whole batch, are those of one process.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.captured import CapturedSteps, Step
from batchnorm.lab.data import Dataset, load
from batchnorm.lab.evaluate import test_accuracy, test_accuracy_by_batch
from batchnorm.lab.handwritten import HandwrittenBatchNorm
from batchnorm.lab.losses import Losses
from batchnorm.lab.nets import LeNet
from batchnorm.lab.processes import ALONE, World, merge_statistics, parallel
from batchnorm.lab.recipes import DTYPES, Config
from batchnorm.lab.scheduled_adam import ScheduledAdam
from batchnorm.model import convert

_STEPS_PER_REPORT = 20


@dataclass(frozen=True)
class EpochResult:
    """What an epoch gave.

    `loss` is the mean cross entropy over the training samples, and `accuracy` that of the test set in
    eval mode. Under the tutorial's protocol they are its own instead: the sum of the batches' mean
    losses divided by (batches * batch size), and the accuracy in training mode, each test batch
    normalised by itself; the usual two are then `mean_loss` and `accuracy_eval`.
    `seconds` is the time of the training part.
    """

    epoch: int
    loss: float
    accuracy: float
    seconds: float
    mean_loss: float | None = None
    accuracy_eval: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that have a value."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Training:
    """A model in training on data that is held in memory, on the device.

    Args:
        config: see `recipes.configure`.
        dataset: what `load_dataset(config)` gives, or another one.
        world: the processes that train together, this one alone by default.

    Attributes:
        model, history: the LeNet, and an EpochResult per epoch so far.
    """

    def __init__(self, config: Config, dataset: Dataset, world: World = ALONE) -> None:
        if config.norm == "handwritten" and not world.alone:
            raise ValueError("the norm handwritten trains in one process: its statistics cannot be merged")
        self.config, self.world = config, world
        torch.set_num_threads(config.threads)
        self.device = world.device(config.device)
        dtype = DTYPES[config.dtype]
        self.autocast = dtype in (torch.bfloat16, torch.float16)
        self.dataset = dataset.to(self.device, torch.float32 if self.autocast else dtype)

        torch.manual_seed(config.seed)
        self.model = LeNet(config.norm, config.activation).to(self.device, self.dataset.train_images.dtype)
        if config.sync:
            convert(self.model, sync=True, fuse=False)
        fused, on_gpu = self.device.type in ("cpu", "cuda"), self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, fused=fused, capturable=on_gpu
        )
        self.schedule = self._make_schedule()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.shuffling = torch.Generator().manual_seed(config.seed)
        self.history: list[EpochResult] = []
        self._captured = self._make_captured() if on_gpu and world.alone else None
        self._parallel: nn.Module | None = None

    def _make_captured(self) -> CapturedSteps | None:
        """Steps for a CUDA graph, where nothing in them is a number of Python's that changes.

        A scaler asks the device for one, and the hand-written layer makes new tensors of its statistics.
        """
        if self.scaler.is_enabled() or self._handwritten():
            return None
        step: Step = self._step
        if self.schedule is not None:
            self._scheduled = ScheduledAdam(self.optimizer, self._one_cycle, self._total_steps)
            step = self._scheduled_step
        data = self.dataset
        return CapturedSteps(step, data.train_images, data.train_labels, self.config.batch_size)

    def _make_schedule(self) -> torch.optim.lr_scheduler.OneCycleLR | None:
        return None if self.config.schedule == "constant" else self._one_cycle(self.optimizer)

    def _one_cycle(self, optimizer: torch.optim.Adam) -> torch.optim.lr_scheduler.OneCycleLR:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, self.config.lr, total_steps=self._total_steps)

    @property
    def _total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether all the epochs are done."""
        return len(self.history) >= self.config.epochs

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch; a single leftover sample is no batch, since it has no variance."""
        whole, leftover = divmod(len(self.dataset.train_labels), self.config.batch_size)
        return whole + (leftover > 1)

    def run_epoch(self, on_steps: Callable[[int], None] = lambda steps: None) -> EpochResult:
        """Train for an epoch and test. `on_steps` is told now and then how many steps were done."""
        start = time.perf_counter()
        losses = self._train(on_steps)
        losses.of_samples.item()  # waits for the device, so that the time is that of the work
        seconds = time.perf_counter() - start
        result = self._summarize(losses, seconds)
        self.history.append(result)
        return result

    def _train(self, on_steps: Callable[[int], None]) -> Losses:
        if self._parallel is None and not self.world.alone:
            self._parallel = parallel(self.model)
        self.model.train()
        losses = Losses(self.device)
        order = torch.randperm(len(self.dataset.train_labels), generator=self.shuffling).to(self.device)
        first = 0
        if self._captured is not None:
            if self.schedule is not None:
                self._scheduled.go_to(self.schedule.last_epoch)
            total, first = self._captured.run(order, on_steps)
            losses.add(total, self.config.batch_size, first)
            self._advance_schedule(first)
        steps = 0
        for images, labels, samples in self._batches(order, first):
            losses.add(self._step(images, labels, samples), samples)
            if self.schedule is not None:
                self.schedule.step()
            steps += 1
            if steps % _STEPS_PER_REPORT == 0:
                on_steps(_STEPS_PER_REPORT)
        on_steps(steps % _STEPS_PER_REPORT)
        losses.add_processes(self.world)
        if not (self.world.alone or self.config.sync):
            merge_statistics(self.model)
        return losses

    def _advance_schedule(self, steps: int) -> None:
        """Let the schedule go on as by these steps of the plain loop."""
        if self.schedule is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the optimizer's own step has not been called
            for _ in range(steps):
                self.schedule.step()

    def _step(self, images: Tensor, labels: Tensor, samples: int = 0) -> Tensor:
        """Train on a batch; its loss. Of this process's part of a batch of so many samples, its part."""
        loss = self._backward(images, labels, samples)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def _scheduled_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """As `_step` with the schedule's, for a CUDA graph."""
        loss = self._backward(images, labels)
        self._scheduled.step()
        return loss

    def _backward(self, images: Tensor, labels: Tensor, samples: int = 0) -> Tensor:
        with torch.autocast(self.device.type, DTYPES[self.config.dtype]) if self.autocast else nullcontext():
            if self._parallel is None:
                loss = total = F.cross_entropy(self.model(images), labels)
            else:
                # By itself an empty part has no statistics. In eval mode it needs none, and takes part.
                self.model.train(self.config.sync or len(labels) > 0)
                loss = F.cross_entropy(self._parallel(images), labels, reduction="sum") / samples
                total = loss * self.world.size  # of the processes' gradients the mean is taken
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        return loss.detach()

    def _batches(self, order: Tensor, first: int = 0) -> Iterator[tuple[Tensor, Tensor, int]]:
        """This process's part of those of an epoch, from the `first` on, and the samples of the whole."""
        data = self.dataset
        batches = order.split(self.config.batch_size)[first : self.steps_per_epoch]
        parts = [self.world.shard(batch) for batch in batches]
        # Shuffled once per epoch, so that a batch is a view: no worker processes, no copy per step.
        mine, sizes = torch.cat([order[:0], *parts]), [len(part) for part in parts]
        images, labels = data.train_images[mine].split(sizes), data.train_labels[mine].split(sizes)
        for part, wanted, batch in zip(images, labels, batches, strict=True):
            yield part, wanted, len(batch)

    def _summarize(self, losses: Losses, seconds: float) -> EpochResult:
        epoch, config = len(self.history) + 1, self.config
        accuracy = test_accuracy(self.model, self.dataset, self.world)
        if not config.tutorial_protocol:
            return EpochResult(epoch, losses.mean(), accuracy, seconds)
        return EpochResult(
            epoch,
            losses.tutorial(config.batch_size),
            test_accuracy_by_batch(self.model, self.dataset, config.batch_size, self.world),
            seconds,
            mean_loss=losses.mean(),
            accuracy_eval=accuracy,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: plain values and tensors, loadable with `weights_only=True`."""
        return {
            "history": [result.as_dict() for result in self.history],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "shuffling": self.shuffling.get_state(),
            "handwritten": {
                name: [layer.running_mean.detach(), layer.running_var.detach()]
                for name, layer in self._handwritten()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`; on the CPU with exactly the numbers of an uninterrupted run."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._check_optimizer()
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self._captured is not None:
            self._captured = self._make_captured()  # a graph would go on with the optimizer's old tensors
        self.scaler.load_state_dict(state["scaler"])
        self.shuffling.set_state(state["shuffling"])
        for name, layer in self._handwritten():
            mean, var = (value.to(self.device) for value in state["handwritten"][name])
            if mean.shape != layer.running_mean.shape or var.shape != layer.running_var.shape:
                raise ValueError(f"the statistics of {name} do not fit it")
            layer.running_mean, layer.running_var = mean, var
        history = [EpochResult(**result) for result in state["history"]]
        if not all(
            isinstance(value, int | float) for result in history for value in result.as_dict().values()
        ):
            raise ValueError("its history holds something that is no number")
        self.history = history

    def _handwritten(self) -> list[tuple[str, HandwrittenBatchNorm]]:
        # Their statistics are in no state_dict: that is one of their faults, and no reason to lose a run.
        modules = self.model.named_modules()
        return [(name, layer) for name, layer in modules if isinstance(layer, HandwrittenBatchNorm)]

    def _check_optimizer(self) -> None:
        # torch takes any shapes here, and its fused kernel then reads and writes beyond their end.
        for group in self.optimizer.param_groups:
            group["fused"] = self.device.type in ("cpu", "cuda")
            group["capturable"] = self.device.type == "cuda"
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                for name, value in state.items():
                    wanted = torch.Size() if name == "step" else parameter.shape
                    if (
                        not isinstance(value, Tensor)
                        or value.shape != wanted
                        or not value.is_floating_point()
                    ):
                        raise ValueError(f"the optimizer's {name} does not fit its parameter")
                if state and set(state) != {"step", "exp_avg", "exp_avg_sq"}:
                    raise ValueError("the optimizer's state is not Adam's")


def load_dataset(config: Config, data_dir: str | None = None) -> Dataset:
    """The data set of a configuration, cut and standardized as it says."""
    dataset = load(config.data, data_dir)
    if config.train_samples is not None or config.test_samples is not None:
        train, test = len(dataset.train_labels), len(dataset.test_labels)
        dataset = dataset.head(
            train if config.train_samples is None else config.train_samples,
            test if config.test_samples is None else config.test_samples,
        )
    return dataset.standardized() if config.standardize else dataset
