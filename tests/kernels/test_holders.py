"""Who else holds a gradient: every way to hold one is seen, and one that nobody else holds is told."""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm.kernels import holders
from batchnorm.kernels.holders import has_no_other_holder


class Backward(torch.autograd.Function):
    """The identity; its backward asks."""

    @staticmethod
    def forward(ctx, x, answers):
        ctx.answers = answers
        return x.clone()

    @staticmethod
    def backward(ctx, grad_y):
        ctx.answers.append(has_no_other_holder(grad_y))
        return grad_y * 1, None


class Asking(nn.Module):
    """A layer whose backward asks."""

    def __init__(self):
        super().__init__()
        self.answers = []

    def forward(self, x):
        return Backward.apply(x, self.answers)


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y


class Constant(torch.autograd.Function):
    """Its gradient is kept for the next time."""

    gradient = torch.ones(4, 6)

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_y):
        return Constant.gradient


def squared(y):
    return y.pow(2).sum()


def twice(layer, x):
    loss = squared(layer(x))
    loss.backward(retain_graph=True)
    loss.backward()


def in_a_thread(layer, x):
    thread = threading.Thread(target=lambda: squared(layer(x)).backward())
    thread.start()
    thread.join()


def with_anomalies_detected(layer, x):
    with torch.autograd.set_detect_anomaly(True):
        squared(layer(x)).backward()


ALONE = {
    "of torch's operation": lambda layer, x: squared(layer(x)).backward(),
    "of a matrix product": lambda layer, x: squared(layer(x) @ torch.randn(6, 6)).backward(),
    "of a backward in Python": lambda layer, x: squared(Identity.apply(layer(x))).backward(),
    "of the same layer": lambda layer, x: squared(layer(layer(x))).backward(),
    "two that are added up": lambda layer, x: (squared((y := layer(x)) * 2) + squared(y * 3)).backward(),
    "of what is changed in place": lambda layer, x: squared((layer(x) + 1).relu_()).backward(),
    "twice": twice,
    "in a thread": in_a_thread,
    "with anomalies detected": with_anomalies_detected,
    "in a checkpoint": lambda layer, x: squared(checkpoint(layer, x * 1, use_reentrant=False)).backward(),
    "for some inputs": lambda layer, x: torch.autograd.backward(squared(layer(x)), inputs=[x]),
    "of a double": lambda layer, x: squared(layer(x).double()).backward(),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_alone(name):
    layer = Asking()
    ALONE[name](layer, torch.randn(4, 6, requires_grad=True))
    assert layer.answers
    assert all(layer.answers)


kept = []


def with_hook(keep, layer, x):
    y = layer(x)
    y.register_hook(keep)
    squared(y).backward()


def with_module_hook(name, hook, layer, x):
    handle = getattr(layer, name)(hook)
    squared(layer(x * 1)).backward()
    handle.remove()


def with_node_hook(name, hook, layer, x):
    y = layer(x)
    getattr(y.grad_fn, name)(hook)
    squared(y).backward()


def with_hook_on_many(layer, x):
    y = layer(x)
    torch.autograd.graph.register_multi_grad_hook([y], kept.append)
    squared(y).backward()


def captured(layer, x):
    y = layer(x)
    torch.autograd.grad(squared(y), [y, x])


def of_a_concatenation(layer, x):
    squared(torch.cat([layer(x), x])).backward()


HELD = {
    "the caller": lambda layer, x: layer(x).backward(torch.ones(4, 6)),
    "a hook": partial(with_hook, kept.append),
    "a detached copy": partial(with_hook, lambda gradient: kept.append(gradient.detach())),
    "an array": partial(with_hook, lambda gradient: kept.append(gradient.numpy())),
    "a view": partial(with_hook, lambda gradient: kept.append(gradient[1:, 2:])),
    "a closure": partial(with_hook, lambda gradient: kept.append(lambda: gradient)),
    "its memory": partial(with_hook, lambda gradient: kept.append(gradient.untyped_storage())),
    "DLPack": partial(with_hook, lambda gradient: kept.append(torch.utils.dlpack.to_dlpack(gradient))),
    "a hook for many": with_hook_on_many,
    "a module's hook": partial(
        with_module_hook, "register_full_backward_hook", lambda module, inputs, outputs: kept.append(outputs)
    ),
    "a module's hook before": partial(
        with_module_hook, "register_full_backward_pre_hook", lambda module, outputs: kept.append(outputs)
    ),
    "a node's hook": partial(with_node_hook, "register_hook", lambda inputs, outputs: kept.append(outputs)),
    "a node's hook before": partial(with_node_hook, "register_prehook", lambda outputs: kept.append(outputs)),
    "who asked for it": captured,
    "a constant": lambda layer, x: Constant.apply(layer(x)).sum().backward(),
    "a neighbour's view": of_a_concatenation,
    "a checkpoint": lambda layer, x: squared(checkpoint(layer, x * 1, use_reentrant=True)).backward(),
    "who has set requires_grad": partial(with_hook, lambda gradient: gradient.clone().requires_grad_()),
    "a class of its own": partial(with_hook, lambda gradient: nn.Parameter(gradient.clone())),
}


@pytest.mark.parametrize("name", HELD)
def test_held(name):
    layer = Asking()
    HELD[name](layer, torch.randn(4, 6, requires_grad=True))
    kept.clear()
    assert layer.answers == [False]


def test_the_second_of_two_that_share_a_gradient_has_it_alone():
    layer, x = Asking(), torch.randn(4, 6, requires_grad=True)
    squared(layer(x) + layer(x * 2)).backward()
    assert layer.answers == [False, True]


@pytest.fixture
def measured_again():
    holders._without_others.cache_clear()
    yield
    holders._without_others.cache_clear()


def answer():
    layer = Asking()
    squared(layer(torch.randn(4, 6, requires_grad=True))).backward()
    return layer.answers


@pytest.mark.parametrize("blind", [1, 2, 3])  # who holds it in C++ shows in Python too
@pytest.mark.usefixtures("measured_again")
def test_no_gradient_is_alone_where_a_holder_would_not_show(monkeypatch, blind):
    count = holders._count

    def without_one(grad_y):
        counts = list(count(grad_y))
        counts[blind] = 0
        return tuple(counts)

    monkeypatch.setattr(holders, "_count", without_one)
    assert answer() == [False]


@pytest.mark.parametrize("missing", ["_memory_count", "_count"])
@pytest.mark.usefixtures("measured_again")
def test_no_gradient_is_alone_where_torch_does_not_count(monkeypatch, missing):
    monkeypatch.setattr(holders, missing, None)
    assert answer() == [False]


@pytest.mark.usefixtures("measured_again")
def test_what_surrounds_the_first_question_makes_no_difference():
    def refuse(tensor):
        raise AssertionError("the measurement saved a tensor through another's hooks")

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        layer = Asking()
        y = squared(layer(torch.randn(4, 6, requires_grad=True)))
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse), torch.device("meta"):
        y.backward()
    assert layer.answers == [True]
