"""Recipes: the named training set-ups, and the configuration of one training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.lab.data import DATASETS
from batchnorm.lab.nets import NORMS

RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {
        "activation": "sigmoid",
        "batch_size": 16,
        "epochs": 5,
        "lr": 0.01,
        "schedule": "constant",
        "standardize": False,
    },
    "fast": {
        "activation": "relu",
        "batch_size": 128,
        "epochs": 5,
        "lr": 0.01,
        "schedule": "one-cycle",
        "standardize": True,
    },
}

# Digits has 1,437 training images. At a constant rate of 0.01 its last epoch is luck: 0.94 to 0.99.
# It trains in seconds on one thread, and on one thread it does so on a busy machine too.
_FOR_DIGITS = {"epochs": 10, "schedule": "one-cycle", "threads": 1}

MOST_THREADS = 1024

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a training run.

    `lr` is the constant rate, or the peak of the one-cycle schedule. `dtype` float32 and float64 are
    the model's own; bfloat16 and float16 train a float32 model under autocast (AMP).
    `train_samples` and `test_samples` keep so many of the data set's first samples, None all.
    `batch_size` is that of all processes together; with `sync` its statistics are too.
    """

    data: str
    recipe: str
    norm: str
    activation: str
    batch_size: int
    epochs: int
    lr: float
    schedule: str
    standardize: bool
    seed: int
    device: str
    dtype: str
    threads: int
    tutorial_protocol: bool
    train_samples: int | None
    test_samples: int | None
    sync: bool = False

    def __post_init__(self) -> None:
        _check_choice("data", self.data, DATASETS)
        _check_choice("recipe", self.recipe, RECIPES)
        _check_choice("norm", self.norm, NORMS)
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("schedule", self.schedule, ("constant", "one-cycle"))
        _check_choice("dtype", self.dtype, DTYPES)
        resolve_device(self.device)
        for what in ("batch_size", "epochs", "seed", "threads", "train_samples", "test_samples"):
            given = getattr(self, what)
            optional = given is None and what.endswith("samples")
            if not optional and type(given) is not int:
                raise ValueError(f"{what} {given!r} must be a whole number")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be from 0 to 2**63 - 1")
        if self.threads > MOST_THREADS:
            raise ValueError(f"threads {self.threads} must be {MOST_THREADS} or fewer")
        _check_at_least("batch size", self.batch_size, 2, ": batch norm needs the variance of a batch")
        _check_at_least("epochs", self.epochs, 1)
        _check_at_least("threads", self.threads, 1)
        for what, samples, least in (
            ("train samples", self.train_samples, 2),
            ("test samples", self.test_samples, 1),
        ):
            if samples is not None:
                _check_at_least(what, samples, least)
        if self.sync and self.norm != "batchnorm":
            raise ValueError(f"sync needs the norm batchnorm, whose layers know it: {self.norm}'s do not")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr} must be above 0 and finite")

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)


def configure(
    data: str = "digits",
    recipe: str = "tutorial",
    *,
    norm: str = "batchnorm",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    tutorial_protocol: bool = False,
    train_samples: int | None = None,
    test_samples: int | None = None,
    sync: bool = False,
    **changes: Any,
) -> Config:
    """A recipe, fitted to the data set, with the `changes` that are not None.

    `threads` is by default 1 below a batch of 16, 2 below 64, else all that torch has: threads that share
    a small step wait for each other more than they compute. Digits has 1.

    Raises:
        ValueError: an unknown name or a value out of its range; the message lists what there is.
    """
    _check_choice("data", data, DATASETS)
    _check_choice("recipe", recipe, RECIPES)
    settings = RECIPES[recipe] | (_FOR_DIGITS if data == "digits" else {})
    settings |= {name: value for name, value in changes.items() if value is not None}
    settings.setdefault("threads", _default_threads(settings["batch_size"]))
    return Config(
        data=data,
        recipe=recipe,
        norm=norm,
        seed=seed,
        device=resolve_device(device),
        dtype=dtype,
        tutorial_protocol=tutorial_protocol,
        train_samples=train_samples,
        test_samples=test_samples,
        sync=sync,
        **settings,
    )


def resolve_device(device: str) -> str:
    """`device`, or for "auto" the best there is of cuda, mps and cpu; ValueError when it is not here."""
    present = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if device == "auto":
        return next(name for name, count in present.items() if count)
    name, colon, index = device.partition(":")
    index = index if colon else "0"
    _check_choice("device", name, present)
    if not index.isdecimal() or int(index) >= present[name]:
        here = ", ".join(name for name, count in present.items() if count)
        raise ValueError(f"device {device!r} is not available to this torch: use one of auto, {here}")
    return device


def _default_threads(batch_size: int) -> int:
    available = torch.get_num_threads()
    if batch_size >= 64:
        return available
    return min(1 if batch_size < 16 else 2, available)


def _check_choice(what: str, given: str, known: Any) -> None:
    if given not in known:
        raise ValueError(f"unknown {what} {given!r}: expected one of {', '.join(known)}")


def _check_at_least(what: str, given: int, least: int, why: str = "") -> None:
    if given < least:
        raise ValueError(f"{what} {given} must be {least} or more{why}")
