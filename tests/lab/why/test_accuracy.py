"""Variances by several formulas, against exact rational numbers."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from batchnorm.lab.why.accuracy import METHODS, chan, correct_digits, one_pass, relative_errors, truth


def exact_variance(values: Tensor) -> float:
    numbers = [Fraction(value) for value in values.tolist()]
    mean = sum(numbers, Fraction()) / len(numbers)
    return float(sum(((number - mean) ** 2 for number in numbers), Fraction()) / len(numbers))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ratio", [0, 1e4, 1e7])
def test_the_truth_is_that_of_rational_numbers(images: Tensor, ratio: float) -> None:
    x = images + ratio
    exact = [exact_variance(x[:, channel].flatten()) for channel in range(2)]
    assert truth(x).tolist() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_are_right_near_zero(name: str, images: Tensor) -> None:
    assert relative_errors(METHODS[name](images), truth(images)).max() < 1e-5


def test_one_pass_by_hand_is_wrong_far_from_zero() -> None:
    # In float32 (4096 + 1)² is rounded to 4097² - 1: the squares' mean lacks what the variance is made of.
    x = torch.tensor([4096.0, 4097.0, 4096.0, 4097.0]).view(4, 1, 1, 1)
    assert truth(x).item() == 0.25
    assert one_pass(x).item() != pytest.approx(0.25, rel=0.5)


def test_pairs_need_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two of values per channel, got 3"):
        chan(torch.zeros(3, 1, 1, 1))


@pytest.mark.parametrize(("error", "digits"), [(0.001, 3), (1, 0), (50, 0), (0, 7.22)])
def test_digits(error: float, digits: float) -> None:
    assert correct_digits(error) == pytest.approx(digits, abs=0.01)
