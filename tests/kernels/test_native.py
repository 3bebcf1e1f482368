"""torch's operator behind the kernels' signatures, against the reference kernel in float64; the choice."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from batchnorm.kernels import choose, native, reference

# Largest error as a share of the largest value of the reference in float64, for the same rounded inputs:
# the order of sums; some roundings of 6e-8; the rounding of a half precision result, with one more for
# what a gradient is multiplied by.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(9, 3), (5, 3, 7), (4, 3, 5, 6), (2, 3, 4, 5, 6)]
EPS = 1e-3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(actual, expected, dtype):
    atol = TOLERANCE[dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def statistics_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def leaves(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_training_is_the_reference(shape, dtype, affine):
    for channel_dim in range(len(shape)):
        x = (torch.randn(shape) * 2 + 1).to(dtype).movedim(1, channel_dim).requires_grad_()
        inputs = [x]
        if affine:
            inputs += [torch.randn(3, dtype=statistics_dtype(dtype), requires_grad=True) for _ in range(2)]
        exact = leaves(*inputs)
        y, moments = native.training(*inputs, *[None] * (3 - len(inputs)), eps=EPS, channel_dim=channel_dim)
        expected, expected_moments = reference.training(
            *exact, *[None] * (3 - len(exact)), eps=EPS, channel_dim=channel_dim
        )
        assert y.dtype == dtype
        assert y.shape == x.shape
        close(y, expected, dtype)
        assert moments.mean.dtype == moments.m2.dtype == statistics_dtype(dtype)
        assert moments.count.dtype == torch.float64
        assert moments.count == expected_moments.count
        close(moments.mean, expected_moments.mean.detach(), torch.float32)
        close(moments.m2, expected_moments.m2.detach(), torch.float32)
        grad = torch.randn(x.shape).to(dtype)
        y.backward(grad)
        expected.backward(grad.double())
        for tensor, exact_tensor in zip(inputs, exact, strict=True):
            assert tensor.grad.dtype == tensor.dtype
            close(tensor.grad, exact_tensor.grad, dtype)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_inference_is_the_reference(shape, dtype, affine):
    kept = statistics_dtype(dtype)
    mean, var = torch.randn(3, dtype=kept), torch.rand(3, dtype=kept) + 0.1
    before = mean.clone(), var.clone()
    for channel_dim in range(len(shape)):
        x = (torch.randn(shape) * 2 + 1).to(dtype).movedim(1, channel_dim).requires_grad_()
        weight, bias = (torch.randn(3, dtype=kept), torch.randn(3, dtype=kept)) if affine else (None, None)
        y = native.inference(x, mean, var, weight, bias, eps=EPS, channel_dim=channel_dim)
        (exact,) = leaves(x)
        doubles = [None if tensor is None else tensor.double() for tensor in (mean, var, weight, bias)]
        expected = reference.inference(exact, *doubles, eps=EPS, channel_dim=channel_dim)
        assert y.dtype == dtype
        close(y, expected, dtype)
        grad = torch.randn(x.shape).to(dtype)
        y.backward(grad)
        expected.backward(grad.double())
        close(x.grad, exact.grad, dtype)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_moments_far_off_centre():
    # m2 is had from a variance that torch rounds to float32; nothing is lost on the way.
    for ratio in (0, 1, 10, 100, 1_000, 10_000):
        x = (torch.randn(64, 3, 200).double() + ratio).float()
        _, moments = native.training(x, None, None, eps=EPS, channel_dim=1)
        expected = x.double().var((0, 2), correction=0)
        assert ((moments.var().double() - expected) / expected).abs().max() <= 1e-5


def test_moments_are_outside_the_graph_and_their_own():
    x = torch.randn(8, 3, requires_grad=True)
    _, first = native.training(x, None, None, eps=EPS, channel_dim=1)
    kept = first.mean.clone()
    _, second = native.training(x + 1, None, None, eps=EPS, channel_dim=1)
    assert not first.mean.requires_grad
    assert not first.m2.requires_grad
    assert torch.equal(first.mean, kept)
    assert first.mean.data_ptr() != second.mean.data_ptr()


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (4, 3, 5, 6)])
def test_strided_inputs(shape):
    base = torch.randn(*shape, 2, dtype=torch.float64)
    for channel_dim in range(len(shape)):
        x = base[..., 0].transpose(0, -1).movedim(1, channel_dim) if len(shape) > 2 else base[..., 0]
        y, _ = native.training(x, None, None, eps=EPS, channel_dim=channel_dim)
        expected, _ = reference.training(x, None, None, eps=EPS, channel_dim=channel_dim)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((4, 3, 5, 6), torch.channels_last), ((4, 3, 5, 6, 2), torch.channels_last_3d)],
)
def test_channels_last_is_kept(shape, memory_format):
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    y, _ = native.training(x, torch.randn(3), torch.randn(3), eps=EPS, channel_dim=1)
    # Not through .grad, which takes the layout of its leaf whatever comes.
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous(memory_format=memory_format)
    assert grad.is_contiguous(memory_format=memory_format)
    y = native.inference(x, torch.zeros(3), torch.ones(3), None, None, eps=EPS, channel_dim=1)
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("channel_dim", [0, 1, 2])
def test_derivatives(channel_dim):
    x = torch.randn(3, 3, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, weight, bias):
        return native.training(x, weight, bias, eps=EPS, channel_dim=channel_dim)[0]

    assert gradcheck(function, (x, weight, bias), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (x, weight, bias))


@pytest.mark.xfail(strict=True, reason="torch's double backward takes the saved mean and std as constants")
def test_the_third_derivative():
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def gradient(x):
        y, _ = native.training(x, None, None, eps=0.1, channel_dim=1)
        return torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0]

    assert gradgradcheck(gradient, (x,))


def test_the_statistics_that_it_is_given_move():
    x, mean, var = torch.randn(5, 4, 3, dtype=torch.float64), torch.zeros(3).double(), torch.ones(3).double()
    counter = torch.tensor(7)
    native.training_and_moving(x, None, None, mean, var, counter, momentum=0.25, eps=EPS, channel_dim=2)
    assert counter == 8
    torch.testing.assert_close(mean, 0.25 * x.mean((0, 1)))
    torch.testing.assert_close(var, 0.75 + 0.25 * x.var((0, 1)))


# What it takes, and the choice.


def test_supports():
    one = {dtype: torch.ones(3, dtype=dtype) for dtype in TOLERANCE}
    for dtype, wanted in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        x = torch.randn(4, 3).to(dtype)
        assert native.supports(x)
        assert native.supports(x, (None, None))
        for parameter in TOLERANCE:
            assert native.supports(x, (one[parameter],)) == (parameter == wanted)
            assert native.supports(x, (one[wanted], one[parameter])) == (parameter == wanted)
    for shape in [(0, 3), (4, 0), (4, 3, 0)]:
        assert not native.supports(torch.empty(shape))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_it_supports_works(dtype):
    kept = torch.ones(3, dtype=statistics_dtype(dtype))
    for x in (torch.randn(4, 3).to(dtype), torch.randn(4, 3, device="meta").to(dtype)):
        parameter = kept.to(x.device)
        assert choose(x, 1, (parameter, parameter)) is native
        y, _ = native.training(x, parameter, parameter, eps=EPS, channel_dim=1)
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


def test_the_choice():
    x, weight = torch.randn(4, 3), torch.ones(3)
    assert choose(x, 1) is native
    assert choose(x, 1, (weight, None)) is native
    assert choose(x, 1, (weight.double(),)) is reference
    assert choose(torch.empty(0, 3), 1, (weight,)) is reference


@pytest.mark.parametrize(
    "transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum()), torch.func.jacfwd]
)
def test_a_transform_gets_the_reference(transform):
    chosen = []

    def function(x):
        chosen.append(choose(x, 1))
        return x * 2

    transform(function)(torch.randn(4, 3, 2))
    assert set(chosen) == {reference}


def test_a_compiler_gets_the_reference():
    def function(x):
        return x + (1 if choose(x, 1) is reference else 2)

    x = torch.zeros(4, 3)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), x + 1)
    assert torch.equal(function(x), x + 2)


VIEWS = {
    "contiguous": lambda: torch.randn(4, 3, 5, 6),
    "reversed": lambda: torch.randn(6, 5, 3, 4).permute(3, 2, 1, 0),
    "NCHW memory seen as NHWC": lambda: torch.randn(4, 6, 3, 5).permute(0, 2, 3, 1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("channel_dim", [0, 2, 3])
def test_channels_anywhere_in_any_view(view: str, channel_dim: int) -> None:
    x = VIEWS[view]()
    y, moments = native.training(x, None, None, eps=1e-5, channel_dim=channel_dim)
    wanted, wanted_moments = reference.training(x, None, None, eps=1e-5, channel_dim=channel_dim)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(moments.mean.double(), wanted_moments.mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("view", ["contiguous", "NCHW memory seen as NHWC"])
def test_channels_last_keep_the_layout(view: str) -> None:
    x = VIEWS[view]()
    y, _ = native.training(x, None, None, eps=1e-5, channel_dim=3)
    assert y.stride() == x.stride()
