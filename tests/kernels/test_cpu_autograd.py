"""The CPU kernels and autograd: derivatives, other layouts, and what changes before the backward pass."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import batchnorm as bn
from batchnorm.kernels import cpu
from tests.kernels.cpu_checks import CPU, LAYOUTS, inputs
from tests.kernels.definition import EPS

pytestmark = CPU


@pytest.mark.parametrize("activation", [None, "silu", "relu"])
@pytest.mark.parametrize("shape", [(3, 2, 130), (3, 4, 5), (7, 3)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(shape, activation, with_residual):
    x, weight, bias, residual, _ = inputs(shape, torch.float64)
    tensors = [t.requires_grad_() for t in (x, weight, bias, residual)[: 4 if with_residual else 3]]
    running = (torch.randn(shape[1]).double(), torch.rand(shape[1]).double() + 1)

    def train(x, weight, bias, residual=None):
        return cpu.training(
            x, weight, bias, eps=EPS, channel_dim=1, activation=activation, residual=residual
        )[0]

    def evaluate(x, weight, bias, residual=None):
        options = {"eps": EPS, "channel_dim": 1, "activation": activation, "residual": residual}
        return cpu.inference(x, *running, weight, bias, **options)

    fast = shape[-1] == 130
    for function in (train, evaluate):
        assert gradcheck(function, tensors, check_batched_grad=True, fast_mode=fast)
        assert gradgradcheck(function, tensors, fast_mode=fast, atol=1e-4)


def scattered(tensor):
    """The same numbers, with others between them, in the reverse order of dimensions."""
    reverse = [*range(tensor.ndim)][::-1]
    found = torch.stack([tensor.permute(reverse).contiguous()] * 2, -1)[..., 0].permute(reverse)
    assert torch.equal(found, tensor)
    return found


@pytest.mark.parametrize(("shape", "last"), LAYOUTS)
def test_backward_passes_again_and_odd_upstream_gradients(shape, last):
    x, weight, bias, _, grad = inputs(shape, torch.float64, last)
    x.requires_grad_()
    y, _ = cpu.training(x, weight, bias, eps=EPS, channel_dim=1, activation="relu")
    first, second, strided = (
        torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
        for upstream in (grad, grad, scattered(grad))
    )
    assert torch.equal(first, second)
    assert torch.equal(first, strided)
    ones, expanded = (
        torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
        for upstream in (torch.ones_like(y), torch.ones((), dtype=y.dtype).expand_as(y))
    )
    assert torch.equal(ones, expanded)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("shape", "last"), LAYOUTS)
def test_a_residual_in_another_layout(shape, last, activation):
    x, weight, bias, residual, grad = inputs(shape, torch.float64, last)
    found = []
    for other in (residual, scattered(residual)):
        leaf = other.requires_grad_()
        y, _ = cpu.training(x, weight, bias, eps=EPS, channel_dim=1, activation=activation, residual=leaf)
        assert y.stride() == x.stride()
        found.append((y, torch.autograd.grad(y, leaf, grad)[0]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_tensors_changed_in_place():
    x, weight, bias, _, grad = inputs((4, 5, 200), torch.float64)
    weight.requires_grad_()
    y, _ = cpu.training(x, weight, bias, eps=EPS, channel_dim=1)
    (wanted,) = torch.autograd.grad(y, weight, grad, retain_graph=True)
    weight.data.mul_(2)
    assert torch.equal(torch.autograd.grad(y, weight, grad, retain_graph=True)[0], wanted)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, weight, grad, create_graph=True)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


def test_buffers_may_be_overwritten_before_the_backward_pass():
    layer = bn.BatchNorm2d(5)
    x, grad = torch.randn(2, 4, 5, 9, 9)
    for train in (True, False):
        layer.train(train)
        layer.zero_grad()
        layer(x).backward(grad)
        wanted = layer.weight.grad.clone()
        layer.zero_grad()
        y = layer(x)
        layer.running_mean.add_(1)
        layer.running_var.mul_(2)
        y.backward(grad)
        torch.testing.assert_close(layer.weight.grad, wanted, rtol=0, atol=0)
