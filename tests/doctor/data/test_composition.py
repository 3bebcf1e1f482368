"""BN217's classes: integers of any size, and integers that are no classes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.doctor.finding import Finding


def found(targets: Callable[[int], Tensor], batches: int = 4) -> list[Finding]:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    loader = [(torch.randn(16, 4, generator=generator), targets(number)) for number in range(batches)]
    return [finding for finding in bn.diagnose(net, loader).findings if finding.code == "BN217"]


def test_classes_in_order_are_found_whatever_numbers_stand_for_them() -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.tensor([-(2**62), 3, 2**40, 2**62])
    (finding,) = found(lambda batch: numbers[batch].expand(16))
    assert finding.evidence["classes"] == 1
    assert not found(lambda batch: numbers[torch.randint(0, 4, (16,), generator=generator)])


@pytest.mark.parametrize("step", [1, 2**40])
def test_integers_that_are_all_different_are_no_classes(step: int) -> None:
    assert not found(lambda batch: (batch * 16 + torch.arange(16)) * step)


def test_an_empty_batch_has_no_classes() -> None:
    assert not found(lambda batch: torch.arange(0))
