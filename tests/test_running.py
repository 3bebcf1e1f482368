"""How running statistics move: against the formula in float64, and torch's own update."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchnorm import Moments
from batchnorm.running import averaging_factor, moved, moves

# A running value is a sum of two products: a few roundings of its dtype.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(actual, expected, dtype):
    assert actual.dtype == dtype
    rtol = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol)


# averaging_factor.


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, 1])
@pytest.mark.parametrize("seen", [None, 7, torch.tensor(7)])
def test_momentum_is_the_factor(momentum, seen):
    assert averaging_factor(momentum, seen, torch.float32) == momentum


@pytest.mark.parametrize("seen", [0, 1, 4, 999])
def test_cumulative_factor(seen):
    assert averaging_factor(None, seen, torch.float32) == 1 / (seen + 1)
    for dtype in (torch.float32, torch.float64):
        factor = averaging_factor(None, torch.tensor(seen), dtype)
        assert factor.dtype == dtype
        torch.testing.assert_close(factor, torch.tensor(1 / (seen + 1), dtype=dtype))


def test_cumulative_factor_reads_no_value():
    # A meta tensor has none; on a GPU reading one is a sync, under torch.compile a graph break.
    factor = averaging_factor(None, torch.tensor(3, device="meta"), torch.float32)
    assert factor.is_meta
    assert factor.shape == ()


def test_cumulative_factor_leaves_the_counter_alone():
    seen = torch.tensor(3)
    averaging_factor(None, seen, torch.float32)
    assert seen == 3
    assert seen._version == 0


def test_cumulative_factor_needs_a_count():
    with pytest.raises(ValueError, match=r"momentum=None .* needs num_batches_tracked"):
        averaging_factor(None, None, torch.float32)


# moved.


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("factor", [0, 0.1, 0.7, 1, torch.tensor(0.25)])
@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_formula(dtype, factor, correction):
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    mean, var = torch.randn(3).to(dtype), (torch.rand(3) + 0.5).to(dtype)
    new_mean, new_var, any_moved = moved(
        mean, var, Moments.from_tensor(x), factor=factor, correction=correction
    )
    a = float(factor)
    batch_var = ((x - x.mean((0, 2), keepdim=True)) ** 2).sum((0, 2)) / (24 - correction)
    close(new_mean, (1 - a) * mean.double() + a * x.mean((0, 2)), dtype)
    close(new_var, (1 - a) * var.double() + a * batch_var, dtype)
    assert any_moved.dtype == torch.bool
    assert any_moved.shape == ()
    assert any_moved


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_a_series_moves_as_torch_does(momentum):
    mean, var = torch.zeros(3), torch.ones(3)
    torch_mean, torch_var = mean.clone(), var.clone()
    for step in range(20):
        x = torch.randn(8, 3) * step + step
        mean, var, _ = moved(mean, var, Moments.from_tensor(x), factor=momentum)
        F.batch_norm(x, torch_mean, torch_var, training=True, momentum=momentum)
    torch.testing.assert_close(mean, torch_mean)
    torch.testing.assert_close(var, torch_var)


def test_a_cumulative_series_is_the_mean_over_the_batches():
    xs = torch.randn(10, 8, 3).double()
    mean, var = torch.randn(3).double(), torch.rand(3).double()
    for seen, x in enumerate(xs):
        factor = averaging_factor(None, torch.tensor(seen), torch.float64)
        mean, var, _ = moved(mean, var, Moments.from_tensor(x), factor=factor)
    close(mean, xs.mean((0, 1)), torch.float64)
    close(var, xs.var(1).mean(0), torch.float64)


def test_nothing_is_written_into():
    x = torch.randn(6, 3)
    mean, var, moments = torch.randn(3), torch.rand(3), Moments.from_tensor(x)
    tensors = [mean, var, moments.count, moments.mean, moments.m2]
    before = [(tensor.clone(), tensor._version) for tensor in tensors]
    new = moved(mean, var, moments, factor=0.1)
    for tensor, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, values)
        assert tensor._version == version
    assert new[0].data_ptr() != mean.data_ptr()
    assert new[1].data_ptr() != var.data_ptr()


def test_outside_the_graph():
    x = torch.randn(6, 3, requires_grad=True)
    mean, var = torch.randn(3, requires_grad=True), torch.rand(3, requires_grad=True)
    for new in moved(mean, var, Moments.from_tensor(x), factor=torch.tensor(0.1, requires_grad=True)):
        assert not new.requires_grad


def test_outside_forward_mode_differentiation():
    tensors = torch.randn(6, 3), torch.randn(3), torch.rand(3)

    def function(x, mean, var):
        return moved(mean, var, Moments.from_tensor(x), factor=0.1)[:2]

    _, tangents = torch.func.jvp(function, tensors, tuple(map(torch.ones_like, tensors)))
    assert all((tangent == 0).all() for tangent in tangents)


def test_a_channel_without_enough_values_stays():
    mask = torch.tensor([[True, True, False], [True, False, False], [True, False, False]])
    x, mean, var = torch.randn(3, 3), torch.randn(3), torch.rand(3)
    moments = Moments.from_tensor(x, mask=mask)
    for correction, stays in ((0, [False, False, True]), (1, [False, True, True]), (3, [True] * 3)):
        new_mean, new_var, any_moved = moved(mean, var, moments, factor=0.5, correction=correction)
        assert (new_mean == mean).tolist() == stays
        assert (new_var == var).tolist() == stays
        assert new_var.isfinite().all()
        assert any_moved == (not all(stays))


def test_an_empty_batch_moves_nothing():
    mean, var = torch.randn(3), torch.rand(3)
    for correction in (0, 1):
        new_mean, new_var, any_moved = moved(
            mean, var, Moments.from_tensor(torch.empty(0, 3)), factor=0.5, correction=correction
        )
        assert torch.equal(new_mean, mean)
        assert torch.equal(new_var, var)
        assert not any_moved


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite(bad):
    x, mean, var = torch.randn(6, 3), torch.randn(3), torch.rand(3)
    x[2, 1] = bad
    moments = Moments.from_tensor(x)
    new_mean, new_var, any_moved = moved(mean, var, moments, factor=0.5)
    assert new_mean.isfinite().tolist() == new_var.isfinite().tolist() == [True, False, True]
    assert any_moved
    new_mean, new_var, any_moved = moved(mean, var, moments, factor=0.5, skip_nonfinite=True)
    assert torch.equal(new_mean, mean)
    assert torch.equal(new_var, var)
    assert not any_moved


def test_a_variance_that_overflows_is_skipped():
    x, mean, var = torch.tensor([[1e30, 1.0], [-1e30, 2.0]]), torch.zeros(2), torch.ones(2)
    assert Moments.from_tensor(x).mean.isfinite().all()
    new_mean, new_var, any_moved = moved(mean, var, Moments.from_tensor(x), factor=0.5, skip_nonfinite=True)
    assert torch.equal(new_mean, mean)
    assert torch.equal(new_var, var)
    assert not any_moved


@pytest.mark.parametrize("bad", ["mean", "m2"])
def test_either_moment_that_is_not_finite_is_skipped(bad):
    parts = {"mean": torch.zeros(2), "m2": torch.ones(2)}
    parts[bad] = torch.tensor([1.0, math.inf])
    mean, var = torch.randn(2), torch.rand(2)
    moments = Moments(torch.tensor(4.0).double(), **parts)
    new_mean, new_var, any_moved = moved(mean, var, moments, factor=0.5, skip_nonfinite=True)
    assert torch.equal(new_mean, mean)
    assert torch.equal(new_var, var)
    assert not any_moved


def test_skipping_leaves_finite_batches_alone():
    x, mean, var = torch.randn(6, 3), torch.randn(3), torch.rand(3)
    plain = moved(mean, var, Moments.from_tensor(x), factor=0.5)
    skipping = moved(mean, var, Moments.from_tensor(x), factor=0.5, skip_nonfinite=True)
    assert all(map(torch.equal, plain, skipping))


def test_skipping_reads_no_value():
    # There is none to read in a meta tensor.
    mean = torch.zeros(3, device="meta")
    moments = Moments.from_tensor(torch.randn(6, 3, device="meta"))
    assert all(tensor.is_meta for tensor in moved(mean, mean, moments, factor=0.5, skip_nonfinite=True))


def test_wide_running_statistics_keep_their_digits():
    # 0.1 in float64 is no float32.
    mean, var = torch.full((3,), 0.1).double() + 1e-12, torch.full((3,), 0.1).double() + 1e-12
    moments = Moments.from_tensor(torch.randn(6, 3))
    new_mean, new_var, _ = moved(mean, var, moments, factor=0.0)
    assert torch.equal(new_mean, mean)
    assert torch.equal(new_var, var)


def test_vmap_moves_for_each_example():
    x, mean, var = torch.randn(4, 6, 3), torch.randn(3), torch.rand(3)

    def move(x):
        return moved(mean, var, Moments.from_tensor(x), factor=0.3, skip_nonfinite=True)

    stacked = torch.vmap(move)(x)
    for i in range(4):
        torch.testing.assert_close(tuple(tensor[i] for tensor in stacked), move(x[i]))


# moves.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_moves_in_a_tracked_training_forward_only(training, track):
    assert moves(training, track) == (training and track)


class Recorder(nn.Module):
    """Notes at every forward whether statistics would move."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def forward(self, x):
        self.moved.append(moves(True, True))
        return x.sin()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_not_when_a_checkpoint_computes_again(use_reentrant):
    recorder, x = Recorder(), torch.randn(3, requires_grad=True)
    for _ in range(2):
        checkpoint(recorder, x, use_reentrant=use_reentrant).sum().backward()
    assert recorder.moved == [True, False] * 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_not_in_nested_checkpoints(use_reentrant):
    recorder, x = Recorder(), torch.randn(3, requires_grad=True)

    def inner(x):
        return checkpoint(recorder, x, use_reentrant=use_reentrant)

    checkpoint(inner, x, use_reentrant=use_reentrant).sum().backward()
    assert recorder.moved[0]
    assert len(recorder.moved) >= 2
    assert not any(recorder.moved[1:])


def test_not_in_a_backward_hook():
    recorder, x = Recorder(), torch.randn(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: recorder(grad))
    y.sum().backward()
    assert recorder.moved == [False]


def test_again_after_a_backward_that_failed():
    x = torch.randn(3, requires_grad=True)
    y = x * 2

    def fail(grad):
        raise RuntimeError("on purpose")

    y.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        y.sum().backward()
    assert moves(True, True)


def test_in_the_forward_of_torch_func():
    for transform in (torch.func.grad, torch.func.vjp, torch.func.jacrev):
        recorder, x = Recorder(), torch.randn(3)

        def function(x, recorder=recorder):
            return recorder(x).sum()

        transform(function, x) if transform is torch.func.vjp else transform(function)(x)
        assert recorder.moved == [True]


def test_under_compile():
    def function(x):
        return x + 1 if moves(True, True) else x

    x = torch.zeros(2)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), x + 1)
