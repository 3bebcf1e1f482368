"""The CPU kernels on inputs computed from each other, and on tensors whose memory is not what they say."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.kernels import choose, cpu, reference
from tests.kernels.cpu_checks import CPU, in_process

EPS = 1e-3
SHAPE = (6, 4, 5)
OPTIONS = {"eps": EPS, "channel_dim": 1}

pytestmark = CPU


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# Inputs that depend on each other: a gradient with a graph must not go through one of them into another.
DEPENDENT = {
    "residual upstream of x": lambda a: ((a * a).sin(), None, None, a),
    "x upstream of residual": lambda a: (a, None, None, (a * a).sin()),
    "x is the residual": lambda a: (a, None, None, a),
    "weight depends on x": lambda a: (a, a.mean((0, 2)), None, None),
    "bias depends on weight": lambda a: (a.detach(), a[0, :, 0], 2 * a[0, :, 0], None),
    "weight is the bias": lambda a: (a.detach(), a[0, :, 0], a[0, :, 0], None),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dependence", DEPENDENT)
@pytest.mark.parametrize("batched", [False, True], ids=["create_graph", "is_grads_batched"])
def test_gradients_of_dependent_inputs(dependence, activation, training, batched):
    a = leaf(*SHAPE)
    grad = torch.randn((2, *SHAPE) if batched else SHAPE, dtype=torch.float64)
    running = torch.randn(4).double(), torch.rand(4).double() + 1
    found = []
    for kernel in (cpu, reference):
        x, weight, bias, residual = DEPENDENT[dependence](a)
        options = {**OPTIONS, "activation": activation, "residual": residual}
        if training:
            y, _ = kernel.training(x, weight, bias, **options)
        else:
            y = kernel.inference(x, *running, weight, bias, **options)
        if batched:
            found.append(torch.autograd.grad(y, a, grad, is_grads_batched=True))
        else:
            (first,) = torch.autograd.grad(y, a, grad, create_graph=True)
            found.append((first, *torch.autograd.grad(first.square().sum() + a.square().sum(), a)))
    assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_gradient_penalty_of_a_residual_block():
    conv, layer = nn.Conv2d(4, 4, 3, padding=1).double(), bn.BatchNorm2d(4, activation="silu").double()
    x = leaf(3, 4, 5, 5)

    def gradient(create_graph):
        y = layer(conv(x), residual=x)
        return torch.autograd.grad(y.square().sum(), x, create_graph=create_graph)[0]

    assert_close(gradient(True), gradient(False))


# Tensors whose memory is not what they say.


@pytest.mark.parametrize("which", ["weight", "bias", "residual", "mean", "var"])
def test_a_negative_view_of_an_input(which):
    x = torch.randn(SHAPE)
    tensors = {name: -torch.rand(4) for name in ("weight", "bias", "mean", "var")}
    tensors["residual"] = torch.randn(SHAPE)
    tensors["var"] = -tensors["var"]
    results = []
    for view in (torch.neg, torch._neg_view):
        t = dict(tensors)
        # Minus minus: the memory holds the other sign.
        t[which] = view(-t[which])
        per_channel = t["mean"], t["var"], t["weight"], t["bias"]
        kernel = choose(x, 1, per_channel, t["residual"])
        results.append(kernel.inference(x, *per_channel, residual=t["residual"], **OPTIONS))
    assert_close(*results)


def test_a_negative_view_as_upstream_gradient():
    x = torch.randn(SHAPE, requires_grad=True)
    y, _ = cpu.training(x, None, None, **OPTIONS)
    grad = torch.randn(SHAPE)
    (wanted,) = torch.autograd.grad(y, x, -grad, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x, torch._neg_view(grad))[0], wanted)


def test_an_upstream_gradient_of_zeros_without_memory():
    # In a process of its own, as it reads at address 0.
    code = """
import torch
from batchnorm.kernels import cpu
cpu.pays = lambda *call: True
x = torch.randn(6, 4, 5, requires_grad=True)
y, _ = cpu.training(x, None, None, eps=1e-3, channel_dim=1)
(grad,) = torch.autograd.grad(y, x, torch._efficientzerotensor(y.shape))
assert (grad == 0).all()
"""
    in_process(code)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_tensors_kept_from_a_transform_that_is_over(with_gradients):
    x, kept = torch.randn(SHAPE), []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(x)
    assert torch._C._functorch.is_functorch_wrapped_tensor(kept[0])
    layer = bn.BatchNorm1d(4, activation="relu")
    with torch.set_grad_enabled(with_gradients):
        assert choose(kept[0], 1) is not cpu
        assert_close(layer(kept[0]), layer(x))
        assert_close(layer(x, residual=kept[0]), layer(x, residual=x))


def test_parameters_elsewhere_are_refused():
    x, weight = torch.randn(SHAPE), torch.ones(4, device="meta")
    assert choose(x, 1, (weight,)) is not cpu
    with pytest.raises(RuntimeError):
        bn.BatchNorm1d(4, device="meta")(x)


# Layers whose tensors are not as they were made.


def replaced(name, tensor):
    """Our layer and torch's, with one of their tensors replaced by copies of this one, strides included."""
    layers = bn.BatchNorm1d(4), nn.BatchNorm1d(4)
    for layer in layers:
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
        setattr(layer, name, nn.Parameter(copy) if name in ("weight", "bias") else copy)
    return layers


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_layer_whose_tensor_has_gaps(name):
    ours, theirs = replaced(name, (torch.rand(4, 2) + 0.5)[:, 0])
    x = torch.randn(SHAPE) * 3
    assert_close(ours(x), theirs(x))
    assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_layer_with_one_tensor_of_another_dtype(name, dtype):
    ours, _ = replaced(name, torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=dtype))
    x = torch.randn(SHAPE) * 3
    before = {key: value.double().clone() for key, value in ours.state_dict().items()}
    y = ours(x)  # torch.nn refuses it
    wanted = nn.BatchNorm1d(4).double()
    wanted.load_state_dict({**before, "num_batches_tracked": before["num_batches_tracked"].long()})
    assert_close(y.double(), wanted(x.double()), rtol=1e-5, atol=1e-5)
    moved = ours.state_dict()[name]
    assert_close(moved, wanted.state_dict()[name].to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64], ids=str)
def test_a_counter_of_another_dtype(dtype):
    layer = bn.BatchNorm1d(4)
    memory = torch.tensor([-1, 7], dtype=dtype)
    layer.num_batches_tracked = memory[0]
    layer(torch.randn(SHAPE))
    assert memory.tolist() == [0, 7]


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_layer_with_a_tensor_of_the_wrong_length(name):
    ours, theirs = replaced(name, torch.ones(3))
    for layer in (ours, theirs):
        with pytest.raises((RuntimeError, ValueError)):
            layer(torch.randn(SHAPE))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_are_not_finite(name, value):
    ours, theirs = replaced(name, torch.tensor([1.0, value, 1.0, 1.0]))
    x = torch.randn(SHAPE)
    for layer in (ours.eval(), theirs.eval()):
        layer.requires_grad_(False)
    assert_close(ours(x), theirs(x), equal_nan=True)


def test_a_frozen_model_made_in_inference_mode():
    # Nothing requires a gradient, so nothing is saved; torch.nn takes it.
    with torch.inference_mode():
        ours, theirs = bn.BatchNorm1d(4), nn.BatchNorm1d(4)
    x = torch.randn(SHAPE)
    for layer in (ours, theirs):
        layer.eval().requires_grad_(False)
    assert_close(ours(x), theirs(x))
