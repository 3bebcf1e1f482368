"""Checks that the tests of batch_norm and the layers do not come by."""

import math

import numpy as np
import pytest
import torch

from batchnorm import checks


@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_statistics_dtype(dtype, statistics):
    assert checks.statistics_dtype(torch.empty(2, 3, dtype=dtype)) == statistics


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2])
def test_no_statistics_of_other_dtypes(dtype):
    with pytest.raises(TypeError, match=rf"got {dtype}: convert it first, for example x.float\(\)"):
        checks.statistics_dtype(torch.empty(2, 3, dtype=dtype))


def test_channel_dim_is_counted_from_the_front():
    x = torch.empty(2, 3, 4)
    assert [checks.resolve_channel_dim(x, dim) for dim in (-3, -2, -1, 0, 1, 2)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("x", [np.ones((2, 3)), [[1.0, 2.0]], None])
def test_channel_dim_of_what_is_no_tensor(x):
    with pytest.raises(TypeError, match=rf"expected a torch.Tensor, got {type(x).__name__}"):
        checks.resolve_channel_dim(x, 1)


def test_the_tensor_with_the_wrong_channels_is_named():
    x = torch.empty(2, 3, 4)
    checks.check_channels(x, 1, weight=torch.empty(3), bias=None)
    for bad in (torch.empty(4), torch.empty(3, 1), torch.empty(()), torch.empty(1)):
        with pytest.raises(ValueError, match=r"^bias has shape \(.*\(2, 3, 4\).* 3 channels .*dimension 1"):
            checks.check_channels(x, 1, weight=torch.empty(3), bias=bad)


@pytest.mark.parametrize(
    ("shape", "channel_dim", "ghost"),
    [
        ((1, 3), 1, None),
        ((1, 3, 1, 1), 1, None),
        ((3, 1), 0, None),
        ((1, 1, 3), 2, None),
        ((5, 3), 1, 1),
        ((5, 3, 1), 1, 1),
        ((1, 3), 1, 4),
    ],
)
def test_one_value_per_channel(shape, channel_dim, ghost):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as error:
        checks.check_values_per_channel(torch.empty(shape), channel_dim, ghost)
    assert str(shape) in str(error.value)
    assert "drop_last=True" in str(error.value)
    assert (f"ghost_batch_size={ghost}" in str(error.value)) == (ghost is not None)


@pytest.mark.parametrize(
    ("shape", "channel_dim", "ghost"),
    [
        ((2, 3), 1, None),
        ((1, 3, 2), 1, None),
        ((0, 3), 1, None),
        ((0, 3), 1, 1),
        ((4, 0), 1, None),
        ((1, 3, 2), 1, 1),
        ((3, 3), 1, 2),
        ((3, 2), 0, None),
    ],
)
def test_enough_values_per_channel(shape, channel_dim, ghost):
    checks.check_values_per_channel(torch.empty(shape), channel_dim, ghost)


def test_residual():
    x = torch.empty(2, 3, 4)
    checks.check_residual(torch.empty(2, 3, 4), x)
    with pytest.raises(ValueError, match=r"residual has shape \(2, 3, 1\), expected .* \(2, 3, 4\)"):
        checks.check_residual(torch.empty(2, 3, 1), x)
    with pytest.raises(TypeError, match=r"residual to be a torch.Tensor, got float"):
        checks.check_residual(1.0, x)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (1, 1, 1), (2, 3, 4)])
def test_masks_that_broadcast(shape):
    checks.check_mask(torch.ones(shape, dtype=torch.bool), torch.empty(2, 3, 4))


@pytest.mark.parametrize("shape", [(2,), (2, 1), (4, 1), (3, 3, 4), (2, 3, 4, 1), (1, 2, 3, 4), (0,)])
def test_masks_that_do_not_broadcast(shape):
    with pytest.raises(ValueError, match="does not broadcast to the input's"):
        checks.check_mask(torch.ones(shape, dtype=torch.bool), torch.empty(2, 3, 4))


def test_an_axis_of_one_is_not_stretched_to_the_mask():
    # Broadcasting the other way would change the input's shape.
    with pytest.raises(ValueError, match="does not broadcast"):
        checks.check_mask(torch.ones(5, 3, dtype=torch.bool), torch.empty(1, 3))


def test_weights_are_not_read_where_they_cannot_be():
    x, weights = torch.empty(2, 3), -torch.ones(2, 1)
    with pytest.raises(ValueError, match="negative"):
        checks.check_mask(weights, x)
    checks.check_mask(weights.to("meta"), x)

    def check(weights):
        checks.check_mask(weights, x)
        checks.check_masked_count(weights.sum(0), weights)
        return weights

    torch.vmap(check)(weights.expand(4, 2, 1))
    torch.compile(check, fullgraph=True, backend="eager")(weights)


def test_masked_count():
    mask = torch.ones(2, 3, dtype=torch.bool)
    checks.check_masked_count(torch.tensor([2.0, 3.0]), mask)
    checks.check_masked_count(torch.empty(0), mask)
    checks.check_masked_count(torch.zeros(3, device="meta"), mask)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\) is empty"):
        checks.check_masked_count(torch.tensor([2.0, 0.0, 1.0]), mask)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\) leaves a channel one"):
        checks.check_masked_count(torch.tensor([2.0, 1.0]), mask)
    # Weights that sum to 1 may well lie on many values.
    checks.check_masked_count(torch.tensor([2.0, 1.0]), mask.float())


@pytest.mark.parametrize("eps", [0, -1e-5, math.nan, -math.inf])
def test_eps(eps):
    with pytest.raises(ValueError, match=rf"eps={eps} must be above 0"):
        checks.check_eps(eps)
    checks.check_eps(1e-30)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan, math.inf])
def test_momentum(momentum):
    with pytest.raises(ValueError, match=rf"momentum={momentum} is outside \[0, 1\]"):
        checks.check_momentum(momentum)


def test_momentum_in_range():
    for momentum in (None, 0, 0.1, 1):
        checks.check_momentum(momentum)


@pytest.mark.parametrize("size", [0, -4, 2.0, 2.5, math.nan])
def test_ghost_batch_size(size):
    with pytest.raises(ValueError, match=rf"ghost_batch_size={size} must be a whole number"):
        checks.check_ghost_batch_size(size)


def test_ghost_batches_need_the_batch_in_front():
    checks.check_ghost_batch_size(4, channel_dim=-1)
    checks.check_ghost_batch_size(None, channel_dim=0)
    with pytest.raises(ValueError, match=r"channel_dim=0 .* x.transpose\(0, 1\)"):
        checks.check_ghost_batch_size(4, channel_dim=0)


@pytest.mark.parametrize("correction", [-1, math.nan])
def test_correction(correction):
    with pytest.raises(ValueError, match=rf"correction={correction} must be 0 or more"):
        checks.check_correction(correction)
    for fine in (0, 1, 0.5, 3):
        checks.check_correction(fine)


def test_activation():
    checks.check_activation(None, ["relu"])
    checks.check_activation("relu", ["relu"])
    for unknown in ("Relu", "", torch.relu):
        with pytest.raises(ValueError, match=r"unknown activation .* one of relu, tanh"):
            checks.check_activation(unknown, ["relu", "tanh"])
