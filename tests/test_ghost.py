"""Ghost batches against a loop over x.split(size) with torch's own batch norm on each."""

import pytest
import torch
from torch.nn import functional as F

from batchnorm import batch_norm
from batchnorm.ghost import Part, each_virtual_batch
from batchnorm.moments import take

# Largest error as a share of the largest value of the oracle in float64: the order of sums, some
# roundings, and the rounding of a half precision result or of the terms that a gradient is the sum of.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(actual, expected):
    assert actual.shape == expected.shape
    atol = TOLERANCE[actual.dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def parameters(dtype=torch.float64):
    weight, bias, mean = (torch.randn(3, dtype=dtype) for _ in range(3))
    return weight, bias, mean, torch.rand(3, dtype=dtype) + 0.5


def chunks(x, size):
    """What is normalised together: x.split(size), a last one of one value per channel with the one before."""
    parts = list(x.split(size))
    if len(parts) > 1 and parts[-1].numel() == x.shape[1]:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def loop(x, size, weight, bias, mean, var, momentum=0.1):
    """Output and new statistics in float64: those of the whole batch, moved once."""
    x, mean, var = x.double(), mean.double().clone(), var.double().clone()
    y = [
        F.batch_norm(part, None, None, weight.double(), bias.double(), training=True)
        for part in chunks(x, size)
    ]
    F.batch_norm(x.detach(), mean, var, training=True, momentum=momentum)
    return torch.cat(y), mean, var


# Whole, with an uneven tail, with a tail of one sample, as large as the batch and larger, one sample each.
SIZES = [2, 3, 4, 5, 6, 9, 10, 11, 100, 1]
SHAPES = [(10, 3, 4), (10, 3, 2, 5), (10, 3, 2, 2, 3), (9, 3, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_loop(shape, size):
    tensors = parameters()
    x = torch.randn(shape, dtype=torch.float64)
    x += torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    x.requires_grad_()
    exact = x.detach().clone().requires_grad_()
    y, mean, var = batch_norm(x, *tensors, ghost_batch_size=size)
    expected, expected_mean, expected_var = loop(exact, size, *tensors)
    close(y, expected)
    close(mean, expected_mean)
    close(var, expected_var)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    close(x.grad, exact.grad)


@pytest.mark.parametrize("samples", range(2, 12))
@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_a_loop_over_vectors(samples, size):
    # (N, C): here a tail of one sample has one value per channel, and joins the chunk before it.
    x, tensors = torch.randn(samples, 3, dtype=torch.float64), parameters()
    for actual, expected in zip(
        batch_norm(x, *tensors, ghost_batch_size=size), loop(x, size, *tensors), strict=True
    ):
        close(actual, expected)


@pytest.mark.parametrize(
    ("shape", "size", "together"),
    [
        ((5, 3), 2, [2, 3]),
        ((3, 3), 2, [3]),
        ((5, 3, 1), 4, [5]),
        ((6, 3), 4, [4, 2]),
        ((5, 3, 2), 2, [2, 2, 1]),
        ((4, 3), 2, [2, 2]),
    ],
)
def test_what_is_normalised_together(shape, size, together):
    y, _, _ = batch_norm(torch.randn(shape, dtype=torch.float64), ghost_batch_size=size)
    zeros = torch.zeros(3, dtype=torch.float64)
    for part in y.split(together):
        torch.testing.assert_close(part.transpose(0, 1).flatten(1).mean(1), zeros, rtol=0, atol=1e-12)
        # And no smaller part is.
        assert part[:1].transpose(0, 1).flatten(1).mean(1).abs().max() > 1e-3 or len(part) == 1


@pytest.mark.parametrize("size", [10, 11, 1000])
def test_a_size_of_the_batch_or_more_is_plain(size):
    x, tensors = torch.randn(10, 3, 4), parameters(torch.float32)
    for actual, expected in zip(
        batch_norm(x, *tensors, ghost_batch_size=size), batch_norm(x, *tensors), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    x, tensors = torch.randn(10, 3, 8).to(dtype), parameters(kept)
    outputs = batch_norm(x, *tensors, ghost_batch_size=4)
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == tensors[2].dtype
    for actual, expected in zip(outputs, loop(x, 4, *tensors), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [2, 4, 9])
def test_the_running_statistics_are_those_of_the_whole_batch(size, momentum):
    # As far from 0 as float32 can take: the virtual batches' moments are merged, not averaged.
    x = (torch.randn(10, 3, 50).double() + 1e4).float()
    tensors = parameters(torch.float32)
    _, mean, var = batch_norm(x, *tensors, ghost_batch_size=size, momentum=momentum)
    _, expected_mean, expected_var = loop(x, size, *tensors, momentum=momentum)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-5, atol=0)
    assert mean.dtype == var.dtype == torch.float32


@pytest.mark.parametrize("size", [2, 3, 4, 9])
@pytest.mark.parametrize("channel_dim", [1, 2, -1, -2])
def test_channel_dim(channel_dim, size):
    x, tensors = torch.randn(10, 3, 4, dtype=torch.float64), parameters()
    y, mean, var = batch_norm(
        x.movedim(1, channel_dim).contiguous(), *tensors, ghost_batch_size=size, channel_dim=channel_dim
    )
    expected = loop(x, size, *tensors)
    close(y, expected[0].movedim(1, channel_dim))
    close(mean, expected[1])
    close(var, expected[2])


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((8, 3, 4, 5), torch.channels_last), ((8, 3, 4, 5, 2), torch.channels_last_3d)],
)
def test_channels_last(shape, memory_format, size):
    x, tensors = torch.randn(shape, dtype=torch.float64), parameters()
    laid = x.to(memory_format=memory_format).requires_grad_()
    y, mean, var = batch_norm(laid, *tensors, ghost_batch_size=size)
    # Not through .grad, which takes the layout of its leaf whatever comes.
    (grad,) = torch.autograd.grad(y.pow(3).sum(), laid)
    assert y.is_contiguous(memory_format=memory_format)
    assert grad.is_contiguous(memory_format=memory_format)
    for actual, expected in zip((y, mean, var), loop(x, size, *tensors), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("size", [2, 3, 4, 9])
@pytest.mark.parametrize("mask_shape", [(10, 1, 4), (10, 3, 4), (10, 1, 1), (1, 1, 4), (4,)])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks(mask_shape, size, boolean):
    x, (weight, bias, mean, var) = torch.randn(10, 3, 4, dtype=torch.float64), parameters()
    mask = torch.rand(mask_shape) > 0.2 if boolean else torch.rand(mask_shape, dtype=torch.float64) + 0.1
    w = mask.double().expand_as(x)
    expected = []
    for part, part_w in zip(x.split(size), w.split(size), strict=True):
        part_mean = (part_w * part).sum((0, 2)) / part_w.sum((0, 2))
        centred = part - part_mean[:, None]
        part_var = (part_w * centred**2).sum((0, 2)) / part_w.sum((0, 2))
        y = centred / (part_var[:, None] + 1e-5).sqrt() * weight[:, None] + bias[:, None]
        expected.append(y)
    y, new_mean, new_var = batch_norm(x, weight, bias, mean, var, mask=mask, ghost_batch_size=size)
    close(y, torch.cat(expected))
    count = w.sum((0, 2))
    whole = (w * x).sum((0, 2)) / count
    m2 = (w * (x - whole[:, None]) ** 2).sum((0, 2))
    close(new_mean, 0.9 * mean + 0.1 * whole)
    close(new_var, 0.9 * var + 0.1 * m2 / (count - 1))


@pytest.mark.parametrize(("empty", "at"), [(slice(2, 4), "stacked"), (slice(8, 10), "last")])
def test_a_virtual_batch_without_values_is_an_error(empty, at):
    mask = torch.ones(10, 1, 4, dtype=torch.bool)
    mask[empty] = False
    size = 2 if at == "stacked" else 8
    with pytest.raises(ValueError, match="is empty: it leaves a channel without a single value"):
        batch_norm(torch.randn(10, 3, 4), mask=mask, ghost_batch_size=size)
    mask[empty] = torch.eye(2, dtype=torch.bool)[:, None, :1].expand(2, 1, 4) & (torch.arange(4) == 0)
    with pytest.raises(ValueError, match="leaves a channel one"):
        batch_norm(torch.randn(10, 3, 4), mask=mask, ghost_batch_size=size)


def test_residual_and_activation():
    x, residual, tensors = torch.randn(10, 3, 4), torch.randn(10, 3, 4), parameters(torch.float32)
    y, _, _ = batch_norm(x, *tensors, ghost_batch_size=4, residual=residual, activation="silu")
    expected, _, _ = loop(x, 4, *tensors)
    close(y, F.silu(expected + residual))


def test_virtual_batches_do_not_see_each_other():
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    y, _, _ = batch_norm(x, ghost_batch_size=2)
    (grad,) = torch.autograd.grad(y[2:4].pow(3).sum(), x)
    assert grad[2:4].any()
    assert not grad[:2].any()
    assert not grad[4:].any()


def test_eval_mode_has_no_ghost_batches():
    x, tensors = torch.randn(10, 3, 4), parameters(torch.float32)
    expected, _, _ = batch_norm(x, *tensors, training=False)
    for size in (1, 2, 4):
        assert torch.equal(batch_norm(x, *tensors, training=False, ghost_batch_size=size)[0], expected)


def test_vectorised():
    # One pass over the stacked virtual batches and one over the tail, however many there are.
    calls = []

    def normalize(part):
        calls.append((tuple(part.x.shape), part.axes, part.reduced))
        return part.x * 2, take(part.x, part.reduced)

    x = torch.randn(35, 3, 4, dtype=torch.float64)
    y, moments = each_virtual_batch(normalize, x, None, 4, 1)
    assert calls == [((8, 4, 3, 4), (0, 2), (1, 3)), ((3, 3, 4), (1,), (0, 2))]
    assert torch.equal(y, x * 2)
    assert moments.count.tolist() == [140] * 3
    close(moments.mean, x.double().mean((0, 2)))


def test_part_stacked():
    x, mask = torch.randn(6, 3, 4), torch.rand(6, 3, 4) > 0.5
    part = Part(x, mask, (1,)).stacked(3, 2)
    assert part.axes == (0, 2)
    assert part.reduced == (1, 3)
    for k in range(3):
        assert torch.equal(part.x[k], x[2 * k : 2 * k + 2])
        assert torch.equal(part.mask[k], mask[2 * k : 2 * k + 2])
    assert Part(x, None, (2,)).stacked(3, 2).mask is None
