"""The interpreted Triton kernels on numbers that are hard to sum: far from zero, constant, NaN and inf."""

import pytest
import torch

from batchnorm.kernels import cuda, native
from tests.kernels.cuda_checks import INTERPRETED, WHOLE, agree, by_kernel, inputs
from tests.kernels.definition import EPS, assert_not_finite_where_torch_is, by_definition

pytestmark = INTERPRETED


@pytest.mark.parametrize(("shape", "last"), [((4, 2, 20, 20), False), ((4, 4, 10, 10), True)])
@pytest.mark.parametrize("whole", [False, True])
def test_far_from_zero(cut, shape, last, whole):
    cut(**WHOLE if whole else {"tile": 1024})
    x, weight, bias, _, grad = inputs(shape, last=last, offset=1e4)
    _, moments = cuda.training(x, weight, bias, eps=EPS, channel_dim=1)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments.var(), var, rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-9, atol=0)
    call = x, weight, bias, None, grad
    agree(by_kernel(*call), by_definition(*call), torch.float32, 3)


def test_one_sample_far_from_the_others(cut):
    cut(tile=32)
    x = torch.randn(8, 2, 32) + 1e4
    x[0] = 0  # shifted sums would take this for the mean
    _, moments = cuda.training(x, None, None, eps=EPS, channel_dim=1)
    torch.testing.assert_close(moments.var(), x.double().var((0, 2), correction=0), rtol=1e-6, atol=0)
    ahead = torch.cat([torch.zeros(1, 2, 32), torch.randn(30, 2, 32) + 1e4])
    torch.testing.assert_close(
        cuda.statistics(ahead, channel_dim=1).var(),
        ahead.double().var((0, 2), correction=0),
        rtol=1e-6,
        atol=0,
    )


HARD = [((3, 2, 3, 5), False), ((3, 3, 3, 5), True)]


@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("constant", [1e-41, 0.1, 1e18])
def test_a_constant_has_no_variance(cut, shape, last, whole, constant):
    if whole:
        cut(**WHOLE)
    x = torch.full(shape, constant)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y, moments = cuda.training(x, None, None, eps=EPS, channel_dim=1)
    torch.testing.assert_close(moments.mean, x.double().flatten()[0].expand(shape[1]), rtol=1e-6, atol=0)
    assert (moments.m2 >= 0).all()
    assert (moments.var().sqrt() <= 1e-7 * abs(constant)).all()
    assert (y == 0).all()


@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize(("whole", "activation"), [(False, "relu"), (True, None)])
@pytest.mark.parametrize("kind", ["nan", "inf", "both infs", "one nan", "one inf"])
def test_nan_and_inf_go_where_torch_lets_them(cut, shape, last, whole, kind, activation):
    cut(**WHOLE if whole else {"tile": 64})
    x, weight, bias, _, grad = inputs(shape, last=last)
    assert_not_finite_where_torch_is(cuda, kind, x, weight, bias, grad, activation)


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "hardsigmoid"])
def test_a_gradient_that_is_nan_or_inf_stops_where_the_slope_is_zero(activation):
    x = torch.tensor([[-9.0, 1.0, -9.0], [1.0, -9.0, -9.0]])[:, :, None].repeat(1, 1, 2)
    grad = torch.tensor([torch.nan, torch.inf])[:, None, None].expand_as(x)
    found = []
    for kernel in (cuda, native):
        leaf = x.clone().requires_grad_()
        mean, var = torch.zeros(3), torch.ones(3)
        y = kernel.inference(leaf, mean, var, None, None, eps=EPS, channel_dim=1, activation=activation)
        y.backward(grad)
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=0, equal_nan=True)
