"""The reference kernel against its formula, written out in float64 numpy and loops."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from batchnorm.kernels import reference

# Largest error as a share of the largest output. float64: what the oracle computes in, up to the order of
# sums. float32: a handful of roundings of 6e-8. Half precision: the one rounding of the output, 2**-9 and
# 2**-12 of it, since statistics and arithmetic are float32.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(9, 3), (5, 3, 7), (4, 3, 5, 6), (2, 3, 4, 5, 6)]
EPS = 1e-3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_hand(x, mean, var, weight, bias, channel_dim):
    """The formula, a channel at a time; `mean` and `var` None stand for those of `x`."""
    x = np.moveaxis(x.detach().double().numpy(), channel_dim, 0)
    y = np.empty_like(x)
    for c in range(len(x)):
        m = x[c].mean() if mean is None else float(mean[c])
        v = x[c].var() if var is None else float(var[c])
        w = 1.0 if weight is None else float(weight[c])
        y[c] = (x[c] - m) / math.sqrt(v + EPS) * w + (0.0 if bias is None else float(bias[c]))
    return torch.from_numpy(np.moveaxis(y, 0, channel_dim))


def close(actual, expected, dtype):
    atol = TOLERANCE[dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


def parameters(dtype, affine):
    if affine == "none":
        return None, None
    weight, bias = torch.randn(3, dtype=torch.float64).to(dtype), torch.randn(3).to(dtype)
    return (weight if affine != "bias" else None), (bias if affine != "weight" else None)


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_training(shape, dtype, affine):
    for channel_dim in range(len(shape)):
        x = (torch.randn(shape) * 2 + 3).to(dtype).movedim(1, channel_dim)
        weight, bias = parameters(dtype, affine)
        y, moments = reference.training(x, weight, bias, eps=EPS, channel_dim=channel_dim)
        assert y.dtype == dtype
        close(y, by_hand(x, None, None, weight, bias, channel_dim), dtype)
        dims = tuple(dim for dim in range(x.ndim) if dim != channel_dim)
        rtol = 1e-13 if dtype == torch.float64 else 1e-6
        values = x.double()
        torch.testing.assert_close(moments.mean.double(), values.mean(dims), rtol=rtol, atol=rtol)
        torch.testing.assert_close(moments.var().double(), values.var(dims, correction=0), rtol=rtol, atol=0)
        assert moments.count == x.numel() // 3


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_inference(shape, dtype, affine):
    for channel_dim in range(len(shape)):
        x = (torch.randn(shape) * 2 + 3).to(dtype).movedim(1, channel_dim)
        weight, bias = parameters(dtype, affine)
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        mean, var = torch.randn(3, dtype=kept) + 3, torch.rand(3, dtype=kept) * 4
        y = reference.inference(x, mean, var, weight, bias, eps=EPS, channel_dim=channel_dim)
        assert y.dtype == dtype
        close(y, by_hand(x, mean, var, weight, bias, channel_dim), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inference_by_half_precision_statistics(dtype):
    # As in model.half(): the arithmetic is float32 all the same, and an eps of 1e-9 is not 0.
    x, var = torch.randn(4, 3, 5).to(dtype), torch.tensor([1e-7, 0.1, 3]).to(dtype)
    mean, weight, bias = (torch.randn(3).to(dtype) for _ in range(3))
    y = reference.inference(x, mean, var, weight, bias, eps=EPS, channel_dim=1)
    assert y.dtype == dtype
    close(y, by_hand(x, mean, var, weight, bias, 1), dtype)
    flat = torch.ones(4, 3, dtype=dtype)
    y = reference.inference(flat, flat[0], flat[0] * 0, None, None, eps=1e-9, channel_dim=1)
    assert (y == 0).all()


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_far_off_centre(ratio):
    x = (torch.randn(32, 3, 20).double() + ratio).float()
    y, _ = reference.training(x, None, None, eps=EPS, channel_dim=1)
    error = y - by_hand(x, None, None, None, None, 1)
    # The mean is rounded to a float32, which moves all outputs of a channel alike, by ratio * 2**-24.
    assert error.abs().max() <= ratio * 2**-24 + 1e-5
    # x * scale + shift instead of (x - mean) * scale would round each of them at ratio * 2**-24 as well.
    assert (error - error.mean((0, 2), keepdim=True)).abs().max() < 5e-6


def test_scale_and_shift():
    var, weight, bias = torch.rand(3), torch.randn(3), torch.randn(3)
    scale, shift = reference.scale_and_shift(var, weight, bias, EPS)
    torch.testing.assert_close(scale, weight / (var + EPS).sqrt())
    assert shift is bias
    scale, shift = reference.scale_and_shift(var, None, None, EPS)
    torch.testing.assert_close(scale, 1 / (var + EPS).sqrt())
    assert shift is None


def test_apply_along_one_axis_and_along_two():
    x = torch.randn(2, 4, 3, 5)
    mean, scale, shift = torch.randn(2, 3), torch.randn(2, 3), torch.randn(3)
    y = reference.apply(x, mean, scale, shift, (0, 2))
    for k in range(2):
        for c in range(3):
            expected = (x[k, :, c] - mean[k, c]) * scale[k, c] + shift[c]
            torch.testing.assert_close(y[k, :, c], expected)
    y = reference.apply(x, mean[0], scale[0], None, (2,))
    for c in range(3):
        torch.testing.assert_close(y[:, :, c], (x[:, :, c] - mean[0, c]) * scale[0, c])


def softplus(x):
    return math.log1p(math.exp(x))


def hardsigmoid(x):
    return min(max(x / 6 + 0.5, 0), 1)


ACTIVATIONS = {
    "relu": lambda x: max(x, 0),
    "relu6": lambda x: min(max(x, 0), 6),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "mish": lambda x: x * math.tanh(softplus(x)),
    "hardswish": lambda x: x * hardsigmoid(x),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "hardsigmoid": hardsigmoid,
    "tanh": math.tanh,
    "softplus": softplus,
}


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_by_their_formulas(name):
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    expected = torch.tensor([float(ACTIVATIONS[name](value)) for value in x.tolist()], dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(reference.ACTIVATIONS[name](x), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(x, before)


def test_the_memory_layout_is_kept():
    weight, bias = torch.randn(3), torch.randn(3)
    for shape, memory_format in [
        ((4, 3, 5, 6), torch.channels_last),
        ((4, 3, 5, 6, 2), torch.channels_last_3d),
        ((4, 3, 5, 6), torch.contiguous_format),
    ]:
        x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
        y, _ = reference.training(x, weight, bias, eps=EPS, channel_dim=1)
        # Not through .grad, which takes the layout of its leaf whatever comes.
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert y.stride() == x.stride() == grad.stride()
    x = torch.randn(4, 5, 6, 3).permute(0, 3, 2, 1)
    y = reference.inference(x, torch.zeros(3), torch.ones(3), weight, bias, eps=EPS, channel_dim=1)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_input_is_float64(dtype):
    # The mean is; were it not rounded, every value of the input would become so too, at half the speed.
    large = []

    def pack(tensor):
        large.append(tensor.dtype if tensor.numel() >= x.numel() else None)
        return tensor

    x = torch.randn(50, 3).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reference.training(x, torch.ones(3, requires_grad=True), torch.zeros(3), eps=EPS, channel_dim=1)
    assert torch.float32 in large
    assert torch.float64 not in large


@pytest.mark.parametrize("channel_dim", [0, 1, 2])
def test_derivatives(channel_dim):
    x = torch.randn(3, 3, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def training(x, weight, bias):
        y, moments = reference.training(x, weight, bias, eps=EPS, channel_dim=channel_dim)
        return y, moments.mean, moments.m2

    assert gradcheck(training, (x, weight, bias), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(training, (x, weight, bias), check_fwd_over_rev=True)

    def inference(x, mean, var, weight, bias):
        return reference.inference(x, mean, var, weight, bias, eps=EPS, channel_dim=channel_dim)

    mean = torch.randn(3, dtype=torch.float64, requires_grad=True)
    var = (torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_()
    assert gradcheck(inference, (x, mean, var, weight, bias), check_forward_ad=True)


def test_the_third_derivative():
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def gradient(x):
        y, _ = reference.training(x, None, None, eps=0.1, channel_dim=1)
        return torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0]

    assert gradgradcheck(gradient, (x,))


def test_identity_recovery():
    # weight = sqrt(var + eps) and bias = mean undo the layer (Ioffe & Szegedy 2015, section 3).
    x = torch.randn(16, 3, 5, dtype=torch.float64) * 3 + 2
    mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
    y, _ = reference.training(x, (var + EPS).sqrt(), mean, eps=EPS, channel_dim=1)
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)


def test_an_empty_batch():
    for shape in [(0, 3), (0, 3, 4), (4, 3, 0)]:
        x = torch.empty(shape, requires_grad=True)
        y, moments = reference.training(x, torch.ones(3), torch.zeros(3), eps=EPS, channel_dim=1)
        assert y.shape == shape
        assert moments.count == 0
        y.sum().backward()
        assert x.grad.shape == shape
