"""Recipes and configurations: what they say, and what they refuse."""

import re
from typing import Any

import pytest
import torch

from batchnorm.lab.recipes import configure, resolve_device


def test_tutorial_recipe_is_the_tutorials() -> None:
    config = configure("fashion-mnist")
    assert (config.activation, config.lr, config.batch_size, config.epochs) == ("sigmoid", 0.01, 16, 5)
    assert (config.schedule, config.standardize, config.norm) == ("constant", False, "batchnorm")


def test_fast_recipe() -> None:
    config = configure("fashion-mnist", "fast")
    assert (config.activation, config.schedule, config.standardize) == ("relu", "one-cycle", True)
    assert config.batch_size > 16


def test_changes_win_over_the_recipe_and_none_is_no_change() -> None:
    config = configure("fashion-mnist", batch_size=4, epochs=None)
    assert (config.batch_size, config.epochs) == (4, 5)


def test_small_batches_get_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    threads = [configure("mnist", batch_size=batch_size).threads for batch_size in (4, 16, 63, 64)]
    assert threads == [1, 2, 2, 8]
    assert configure("mnist", batch_size=64, threads=3).threads == 3
    assert configure("digits", batch_size=64).threads == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert configure("mnist", batch_size=16).threads == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "slow"}, "unknown recipe 'slow': expected one of tutorial, fast"),
        ({"data": "cifar"}, "unknown data 'cifar': expected one of digits, fashion-mnist, mnist"),
        ({"norm": "group"}, "unknown norm 'group': expected one of none, handwritten"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"batch_size": 1}, "batch size 1 must be 2 or more"),
        ({"epochs": 0}, "epochs 0 must be 1 or more"),
        ({"threads": 0}, "threads 0 must be 1 or more"),
        ({"threads": 10**11}, "threads 100000000000 must be 1024 or fewer"),
        ({"threads": 1.5}, "threads 1.5 must be a whole number"),
        ({"seed": 10**20}, "must be from 0 to 2**63 - 1"),
        ({"epochs": True}, "epochs True must be a whole number"),
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"lr": float("nan")}, "lr=nan must be above 0"),
        ({"lr": float("inf")}, "lr=inf must be above 0"),
    ],
)
def test_bad_options_say_what_is_expected(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        configure(**options)


def test_a_device_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert resolve_device("auto") in ("cpu", "mps")
    with pytest.raises(ValueError, match=r"'cuda' is not available to this torch: use one of auto, .*cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize("device", ["cuda:99", "cpu:", "cpu:1", "cpu:x", "cuda:-1"])
def test_a_device_number_that_is_not_here(device: str) -> None:
    with pytest.raises(ValueError, match=f"device {device!r} is not available"):
        configure(device=device)
