"""The CPU kernels' backward writes over a gradient that nobody else holds, with the same numbers."""

import importlib
import itertools
from functools import partial

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import fields
from tests.kernels.cpu_checks import CPU, LAST, LAYOUTS, inputs
from tests.kernels.definition import EPS

pytestmark = CPU

# The package has a function of the module's name.
planning = importlib.import_module("batchnorm.kernels.cpu.plan")

# Cheap and costly ones, with a slope that is told by bits, by the output, or by the residual.
ACTIVATIONS = [None, "relu", "leaky_relu", "hardswish", "silu"]


def called(x, weight, bias, residual, activation):
    """A call that is ready for its backward, and what it has kept to tell the slope."""
    call = cpu.Call(x, 1, fields.OF_BATCH, EPS, activation, residual)
    if call.slope_from == "output":
        call.leave_bits()
    y = call.forward(x, weight, bias, residual)
    return call, {"x": None, "residual": residual, "output": y, "bits": call.bits}[call.slope_from]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "last"), [*LAYOUTS, ((4, 1, 999), False), ((1, 3, 301), False)])
@pytest.mark.parametrize("size", [1.0, 1e38])
def test_the_same_numbers_as_in_new_memory(shape, last, activation, with_residual, size, threads):
    x, weight, bias, residual, grad = inputs(shape, last=last)
    grad *= size  # sums of the larger ones overflow float32
    call, extra = called(x, weight, bias, residual if with_residual else None, activation)
    threads(2)
    for wanted in itertools.product([False, True], repeat=4):
        if wanted[3] and not with_residual:
            continue
        new, over = grad.clone(), grad.clone()
        expected = call.backward(new, x, extra, wanted)
        got = call.backward(over, x, extra, wanted, may_overwrite=True)
        assert torch.equal(new, grad)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        if wanted[0] or wanted[3]:
            assert over.data_ptr() in {found.data_ptr() for found in got if found is not None}
        both = [found.data_ptr() for found in (got[0], got[3]) if found is not None]
        assert len({*both}) == len(both)


def test_a_gradient_in_another_layout_is_left_alone(small_gradients_too):
    x = torch.randn(4, 8, 6, 6).requires_grad_()
    grad = torch.randn(4, 8, 6, 6).contiguous(memory_format=LAST[4])
    before = grad.clone()
    bn.BatchNorm2d(8)(x).backward(grad)
    assert torch.equal(grad, before)


@pytest.fixture
def large_from(monkeypatch):
    """Sets from how many bytes on tensors are large."""

    def set_size(size):
        monkeypatch.setattr(planning, "LARGE", size)
        planning.plan.cache_clear()

    yield set_size
    planning.plan.cache_clear()


@pytest.fixture
def small_gradients_too(large_from):
    large_from(0)


SHAPE = (4, 8, 6, 6)
kept = []


def keep(gradient):
    kept.append((gradient, gradient.clone()))


def keep_view(gradient):
    keep(gradient.detach()[1:])


def keep_array(gradient):
    kept.append((torch.from_numpy(gradient.numpy()), gradient.clone()))


def keep_all(gradients):
    for gradient in gradients:
        if gradient is not None:
            keep(gradient)


def hooked(hook, layer, x):
    y = layer(x)
    y.register_hook(hook)
    return [y * y]


def hooked_after(layer, x):
    y = layer(x)
    y.grad_fn.register_hook(lambda inputs, outputs: keep_all(outputs))
    return [y * y]


def hooked_module(layer, x):
    layer.register_full_backward_hook(lambda module, inputs, outputs: keep_all(outputs))
    y = layer(x * 1)
    return [y * y]


def retained(layer, x):
    y = layer(x)
    y.retain_grad()
    kept.append((y, None))
    return [y * y]


def twice(layer, x):
    y = layer(x)
    return [y * y, y * 3]


class HandsOn(torch.autograd.Function):
    """Its gradient is the one that it was handed, which it keeps."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_y):
        keep(grad_y)
        return grad_y


class Constant(torch.autograd.Function):
    gradient = torch.full(SHAPE, 0.5)

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_y):
        keep(Constant.gradient)
        return Constant.gradient


USES = {
    "nothing else": lambda layer, x: [(y := layer(x)) * y],
    "two layers": lambda layer, x: [(y := layer(layer(x))) * y],
    "a hook": partial(hooked, keep),
    "a hook that keeps a view": partial(hooked, keep_view),
    "a hook that keeps an array": partial(hooked, keep_array),
    "a hook after the backward": hooked_after,
    "a hook of the module": hooked_module,
    "a gradient that is retained": retained,
    "two uses": twice,
    "a sum with itself": lambda layer, x: [(z := (y := layer(x)) + y) * z],
    "a sum of two layers' outputs": lambda layer, x: [(y := layer(x) + layer(x * 2)) * y],
    "a sum with the input": lambda layer, x: [(y := layer(x) + x) * y],
    "a concatenation": lambda layer, x: [(y := torch.cat([layer(x), x], 1)) * y],
    "halves": lambda layer, x: [y * y for y in layer(x).chunk(2, 1)],
    "a part": lambda layer, x: [(y := layer(x)[1:]) * y],
    "an expanded gradient": lambda layer, x: [layer(x)],
    "another layout": lambda layer, x: [(y := layer(x).transpose(0, 1).contiguous()) * y],
    "what hands its gradient on": lambda layer, x: [(y := HandsOn.apply(layer(x))) * y],
    "a constant gradient": lambda layer, x: [Constant.apply(layer(x))],
    "in place": lambda layer, x: [layer(x).add_(1).pow(2)],
    "a residual": lambda layer, x: [(y := layer(x, x * 2)) * y],
    "a sum that goes two ways": lambda layer, x: [(y := layer(s := x * 2)) * y + s.pow(2)],
}


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("name", USES)
def test_whoever_holds_a_gradient_keeps_it(name, activation, small_gradients_too, large_from):
    layer = bn.BatchNorm2d(8, activation=activation)
    x = torch.randn(SHAPE).requires_grad_()

    def gradients():
        kept.clear()
        sum(part.sum() for part in USES[name](layer, x)).backward()
        found = [leaf.grad.clone() for leaf in (x, *layer.parameters())]
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        for gradient, before in kept:
            if before is None:
                found.append(gradient.grad.clone())
            else:
                torch.testing.assert_close(gradient, before, rtol=0, atol=0)
        return found

    got = gradients()
    layer._backward_hooks.clear()
    large_from(float("inf"))
    for a, b in zip(got, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def address_of_gradient(layer, x):
    """Where the layer's backward finds the gradient of its output."""
    found = []
    y = layer(x)
    y.register_hook(lambda gradient: found.append(gradient.data_ptr()))
    (y * y).sum().backward()
    return found[0]


def test_a_large_gradient_becomes_that_of_the_input():
    x = torch.randn(4, 8, 256, 256).requires_grad_()
    assert address_of_gradient(bn.BatchNorm2d(8), x) == x.grad.data_ptr()


def test_in_eval_mode_too():
    x = torch.randn(4, 8, 256, 256).requires_grad_()
    assert address_of_gradient(bn.BatchNorm2d(8).eval(), x) == x.grad.data_ptr()


def test_not_a_small_one():
    """New memory costs it nothing, and to count its holders takes a microsecond."""
    x = torch.randn(SHAPE).requires_grad_()
    assert address_of_gradient(bn.BatchNorm2d(8), x) != x.grad.data_ptr()


def test_second_derivatives(small_gradients_too):
    layer, x = bn.BatchNorm2d(8).double(), torch.randn(SHAPE).double().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    before = first.detach().clone()
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    assert torch.equal(first, before)
    reference = nn.BatchNorm2d(8).double()
    (theirs,) = torch.autograd.grad(reference(x).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(theirs.pow(2).sum(), x)[0])


def test_a_graph_that_is_run_again(small_gradients_too):
    x = torch.randn(SHAPE).requires_grad_()
    loss = bn.BatchNorm2d(8, activation="relu")(x).pow(2).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
