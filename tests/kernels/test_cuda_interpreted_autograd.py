"""The interpreted Triton kernels and autograd: derivatives, what is saved, what is built again."""

from copy import deepcopy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import batchnorm as bn
from batchnorm import kernels
from batchnorm.kernels import cuda
from batchnorm.kernels.cuda import thresholds
from batchnorm.lab.bench_probes import held_bytes
from batchnorm.recipes import Recording
from tests.kernels.cuda_checks import INTERPRETED, WHOLE, agree, assert_built_again, by_kernel, inputs
from tests.kernels.definition import EPS, by_definition

pytestmark = INTERPRETED


def saved(y):
    node = y.grad_fn
    return node.saved_tensors


@pytest.mark.parametrize(
    ("activation", "with_residual", "kept"),
    [("silu", False, "x"), ("relu", True, "xy"), ("silu", True, "xr"), (None, True, "x")],
)
def test_saves_x_and_no_more_than_one_other_that_exists_anyway(activation, with_residual, kept):
    x, weight, bias, residual, _ = inputs((3, 2, 8))
    x.requires_grad_()
    residual = residual if with_residual else None
    y, _ = cuda.training(x, weight, bias, eps=EPS, channel_dim=1, activation=activation, residual=residual)
    wanted = {"x": x, "y": y, "r": residual}
    assert [t.data_ptr() for t in saved(y)] == [wanted[name].data_ptr() for name in kept]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_an_output_is_built_again_to_the_bit(cut, whole, with_residual):
    if whole:
        cut(**WHOLE)
    x, weight, bias, residual, grad = inputs((4, 3, 9), offset=3.0)
    leaf = x.requires_grad_()
    with Recording():
        y, _ = cuda.training(
            leaf, weight, bias, eps=EPS, channel_dim=1, activation="silu",
            residual=residual if with_residual else None,
        )  # fmt: skip
        z = y * y
    assert_built_again(z.grad_fn._saved_self, y)
    z.backward(grad)
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("last", [False, True])
def test_half_precision_is_rebuilt_to_the_bit(monkeypatch, last):
    """memory_efficient under autocast: no convolution keeps the output of the batch norm before it."""
    monkeypatch.setattr(kernels, "cpu", cuda)
    monkeypatch.setattr(cuda, "_work", lambda: True)
    model = torch.nn.Sequential(
        *(
            layer
            for _ in range(3)
            for layer in (torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        )
    )
    plain, efficient = (bn.convert(deepcopy(model), memory_efficient=lean) for lean in (False, True))
    x = torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last if last else torch.contiguous_format)

    def loss(net):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float().square().mean()

    torch.set_autocast_cache_enabled(False)
    try:
        with thresholds.everywhere():
            for net in (plain, efficient):
                loss(net).backward()
            saved = [held_bytes(lambda net=net: loss(net)) for net in (plain, efficient)]
    finally:
        torch.set_autocast_cache_enabled(True)
    for one, other in zip(plain.parameters(), efficient.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    outputs = 2 * 4 * (7 * 7 + 5 * 5) * 2  # of the first two batch norms, in bytes
    assert saved[0] - saved[1] > 0.9 * outputs


def test_double_backward(cut):
    cut(tile=4096)
    for shape in [(3, 2, 4), (6, 3)]:
        x, weight, bias, residual, _ = inputs(shape, torch.float64)
        leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

        def train(x, weight, bias, residual):
            options = {"eps": EPS, "channel_dim": 1, "activation": "silu", "residual": residual}
            return cuda.training(x, weight, bias, **options)[0]

        def infer(x, weight, bias, residual):
            mean, var = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
            return cuda.inference(
                x, mean, var, weight, bias, eps=EPS, channel_dim=1, activation="relu", residual=residual
            )

        for function in (train, infer):
            assert gradcheck(function, leaves, fast_mode=True)
            assert gradgradcheck(function, leaves, fast_mode=True)


def test_gradients_in_another_layout_and_expanded():
    x, weight, bias, _, grad = inputs((3, 4, 3, 3))
    call = x, weight, bias, None, grad.contiguous(memory_format=torch.channels_last), "relu"
    agree(by_kernel(*call), by_definition(*call), torch.float32)
    leaf = x.requires_grad_()
    y, _ = cuda.training(leaf, weight, bias, eps=EPS, channel_dim=1)
    y.sum().backward()
    assert leaf.grad.abs().max() < 1e-5
    residual = torch.randn(3, 3, 3, 4).permute(0, 3, 1, 2)
    call = x, weight, bias, residual, grad, "silu"
    agree(by_kernel(*call), by_definition(*call), torch.float32)


def test_the_same_bits_every_time():
    x, weight, bias, residual, grad = inputs((5, 2, 20))
    first, second = (by_kernel(x, weight, bias, residual, grad, "gelu") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
