"""The bits that a CPU forward leaves for the slope of a piecewise linear activation after a residual."""

import pytest
import torch
from torch.autograd import gradgradcheck

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import fields
from tests.kernels.cpu_checks import CPU, TOLERANCE, inputs
from tests.kernels.definition import EPS

pytestmark = CPU

NAMES = ["relu", "relu6", "leaky_relu"]
SIZES = [49, 63, 64, 65, 95, 96, 97, 128, 4095, 4096, 4097]


class ByOutput(cpu.Call):
    def leave_bits(self):
        pass


def normalise(tensors, activation, slope_from, running=None):
    """x, weight, bias and residual, normalised, with the slope from the bits or the output."""
    x, _, _, residual = tensors
    statistics = fields.OF_BATCH if running is None else fields.RUNNING
    kind = cpu.Call if slope_from == "bits" else ByOutput
    call = kind(x, 1, statistics, EPS, activation, residual)
    if running is not None:
        call.running = *(tensor.data_ptr() for tensor in running), 0, 0.0
    y = call.run(*tensors)
    assert call.slope_from == slope_from
    return y


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_by_the_output(threads, size, activation, dtype, count):
    threads(count)
    # Channels for the threads, or samples where channels do not share out.
    for shape in ((2, 4 * count, size), (4 * count, 5, size)):
        *tensors, grad = inputs(shape, dtype)
        for wanted in ((0, 1, 2, 3), (0,), (3,), (1, 2)):
            found = []
            for slope_from in ("bits", "output"):
                leaves = [tensor.clone() for tensor in tensors]
                for i in wanted:
                    leaves[i].requires_grad_()
                y = normalise(leaves, activation, slope_from)
                found.append([y, *torch.autograd.grad(y, [leaves[i] for i in wanted], grad)])
            for by_bits, by_output in zip(*found, strict=True):
                scale = max(1.0, by_output.abs().max().item())
                torch.testing.assert_close(by_bits, by_output, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", NAMES)
def test_on_the_bends_and_beyond_all_numbers(activation, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    z = [0.0, -0.0, 6.0, -6.0, tiny / 2, -tiny / 2, 5.9999, 6.0001, torch.inf, -torch.inf, torch.nan]
    residual = torch.tensor(z * 48, dtype=dtype).view(1, 6, -1).requires_grad_()
    x = torch.zeros_like(residual).requires_grad_()
    running = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)
    grad = torch.full_like(x, 3.0)
    found = []
    for slope_from in ("bits", "output"):
        y = normalise((x, None, None, residual), activation, slope_from, running)
        found.append((y, torch.autograd.grad(y, residual, grad)[0]))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    expected = getattr(torch.nn.functional, activation)(residual)
    wanted = expected, torch.autograd.grad(expected, residual, grad)[0]
    known = ~residual.isnan() if activation == "relu6" else ...  # at NaN torch's slope depends on the size
    torch.testing.assert_close(
        [tensor[known] for tensor in found[0]],
        [tensor[known] for tensor in wanted],
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("channel_dim", [0, 1, 2])
def test_second_derivatives(activation, channel_dim):
    shape = [3, 2, 2]
    shape.insert(channel_dim, 6)
    *tensors, _ = inputs((*shape, 50), torch.float64, channel_dim=channel_dim)
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def train(x, weight, bias, residual):
        options = {"eps": EPS, "channel_dim": channel_dim, "activation": activation, "residual": residual}
        y, _ = cpu.training(x, weight, bias, **options)
        assert y.grad_fn.saved_tensors[1].dtype == torch.int32
        return y

    assert gradgradcheck(train, tensors, fast_mode=True, atol=1e-4)


def test_what_is_kept_and_what_may_change():
    """The input and a bit for each value; the output may be overwritten."""
    layer = bn.BatchNorm2d(5, activation="relu")
    x, residual, grad = torch.randn(3, 4, 5, 16, 16)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    y = layer(x, residual=residual)
    kept_x, bits = y.grad_fn.saved_tensors
    assert kept_x.data_ptr() == x.data_ptr()
    assert bits.nbytes == y.numel() // 8
    wanted = torch.autograd.grad(y, (x, residual), grad, retain_graph=True)
    y.detach().zero_()
    found = torch.autograd.grad(y, (x, residual), grad)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("activation", [None, "silu", "hardswish"])
def test_only_slopes_of_1_and_one_other_are_bits(activation):
    x, weight, bias, residual, _ = inputs((4, 5, 200))
    call = cpu.Call(x, 1, fields.OF_BATCH, EPS, activation, residual)
    call.run(x.requires_grad_(), weight, bias, residual)
    assert call.slope_from != "bits"


@pytest.mark.parametrize("graph", [False, True])
def test_no_bits_where_nobody_wants_a_gradient(graph):
    x, weight, bias, residual, _ = inputs((4, 5, 200))
    with torch.set_grad_enabled(graph):
        y = normalise((x, weight, bias, residual), "relu", "output")
        call = cpu.Call(x, 1, fields.OF_BATCH, EPS, "relu", residual)
        again = call.run(x, weight, bias, residual)
    assert call.slope_from == "output"
    with_bits = normalise((x.requires_grad_(), weight, bias, residual), "relu", "bits")
    assert torch.equal(y, again)
    assert torch.equal(y, with_bits)


def test_an_output_is_built_again_without_bits():
    x, weight, bias, residual, _ = inputs((4, 5, 200))
    call = cpu.Call(x, 1, fields.OF_BATCH, EPS, "relu", residual)
    y = call.run(x.requires_grad_(), weight, bias, residual)
    assert call.slope_from == "bits"
    assert torch.equal(call.again(x, residual), y)
    assert call.bits is None
