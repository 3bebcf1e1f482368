"""Packing: what comes out of the bytes is what went in, and no class that is not asked for."""

import math
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from batchnorm.doctor.data.noise import take
from batchnorm.doctor.data.recorder import Pass
from batchnorm.doctor.finding import Finding
from batchnorm.model.packing import comes_back, packed, unpacked


def test_values_come_back() -> None:
    finding = Finding("BN999", "note", None, "x", {"ratio": math.inf, "n": 3, "is": True}, "why", "fix")
    value = {"a": [1, 2.5, None, "é"], "b": (1, {"c"}), "d": finding, "e": {}}
    assert unpacked(packed(value)) == value
    assert math.isnan(unpacked(packed(math.nan)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).T,
        torch.arange(5),
        torch.tensor([True, False, True]),
        torch.tensor(2.0, dtype=torch.float64),
        torch.empty(0, 3),
        torch.ones(3, dtype=torch.bfloat16),
    ],
)
def test_tensors_come_back_wherever_they_begin(tensor: Tensor) -> None:
    for text in ("", "1", "12", "123"):  # of every length, so that they begin at odd places
        _, first, same = unpacked(packed([text, torch.tensor([True]), tensor]))
        assert first.tolist() == [True]
        assert same.dtype == tensor.dtype
        assert torch.equal(same, tensor)


def test_what_was_observed_comes_back() -> None:
    statistics = take(torch.randn(4, 3, 5), None)
    same = unpacked(packed(Pass({"bn": [statistics]}, batch_of={"bn": [2]})))
    assert same.batch_of == {"bn": [2]}
    for name in ("images", "values"):
        assert getattr(same.statistics["bn"][0], name) == getattr(statistics, name)
    assert torch.equal(same.statistics["bn"][0].pooled, statistics.pooled)


def test_a_class_that_is_not_sent_is_refused() -> None:
    numbers = packed(Pass())
    spoiled = bytes(numbers.tolist()).replace(b'"Pass"', b'"Pess"')
    with pytest.raises(KeyError, match="Pess"):
        unpacked(torch.tensor(list(spoiled), dtype=torch.uint8))
    with pytest.raises(TypeError, match="object"):
        packed(object())


class Pair(NamedTuple):
    x: Tensor
    y: int


@pytest.mark.parametrize(
    ("value", "does"),
    [
        ((torch.zeros(2), {"mask": [torch.ones(1), None, "a", 2, 0.5, True]}), True),
        (Pair(torch.zeros(2), 1), False),
        ({1: torch.zeros(2)}, False),
        (OrderedDict(x=torch.zeros(2)), False),
        ([torch.zeros(2, requires_grad=True)], False),
        (nn.Parameter(torch.zeros(2)), False),
        (torch.zeros(2, 2).to_sparse(), False),
        (object(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_comes_back_as_it_was(value: object, does: bool) -> None:
    assert comes_back(value) == does
