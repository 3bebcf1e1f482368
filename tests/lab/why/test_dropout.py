"""The variance shift of dropout, against its closed forms."""

import pytest
import torch
from torch import nn

from batchnorm.lab.why.dropout import predicted_ratio, shift_ratio, shift_ratios


def test_the_ratio_counts_either_way() -> None:
    assert shift_ratio(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 4.0])) == 3


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_a_single_weight_gives_the_papers_formula(rate: float) -> None:
    # Li et al. 2018, section 3.1: ((c² + v) / p - c²) / v for inputs of mean c and variance v, kept with p.
    x = torch.randn(50, 1, 20, 20, generator=torch.Generator().manual_seed(0)) * 1.5 + 2
    mean, variance, keep = x.mean(), x.var(correction=0), 1 - rate
    convolution = nn.Conv2d(1, 1, 1, bias=False)
    expected = ((mean**2 + variance) / keep - mean**2) / variance
    with torch.no_grad():
        assert predicted_ratio(convolution, x, rate) == pytest.approx(expected.item(), rel=1e-4)


def test_a_convolution_as_dropout_does_it() -> None:
    torch.manual_seed(0)
    x, convolution = torch.rand(4000, 3, 5, 5), nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    with torch.no_grad():
        dropped = convolution(nn.functional.dropout(x, 0.4)).var((0, 2, 3))
        measured = (dropped / convolution(x).var((0, 2, 3))).mean().item()
        assert predicted_ratio(convolution, x, 0.4) == pytest.approx(measured, rel=0.02)


def test_statistics_of_the_data_themselves_have_no_shift() -> None:
    x = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(2, momentum=1.0)
    norm(x)
    assert shift_ratios(nn.Sequential(norm, nn.ReLU()), x) == pytest.approx([1])
    assert norm.running_var is not None
    norm.running_var *= 4
    assert shift_ratios(nn.Sequential(norm, nn.ReLU()), x) == pytest.approx([4])
