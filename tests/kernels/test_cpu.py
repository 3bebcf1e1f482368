"""The CPU kernels against the definition in float64, at their edges, with threads, and when not used."""

import hashlib
import itertools
import os
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import batchnorm as bn
from batchnorm.kernels import choose, cpu, native, reference
from batchnorm.kernels.autograd import FUSED
from batchnorm.kernels.cpu import fields, launch, machine_code, team
from tests.kernels.definition import EPS, by_definition

# Largest error as a share of the largest value, by dtype: some roundings of 6e-8 and 1e-16.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# `cpu.plan` is the function of that name in the module of that name.
plan_module = sys.modules["batchnorm.kernels.cpu.plan"]

pytestmark = pytest.mark.skipif(not team.available(), reason="torch's threads are not libgomp's here")


@pytest.fixture(autouse=True)
def _small_inputs_too(monkeypatch):
    monkeypatch.setattr(cpu, "pays", lambda *call: True)
    torch.manual_seed(0)


@pytest.fixture
def threads(monkeypatch):
    """A function that sets how many threads even small inputs are computed by."""
    before = torch.get_num_threads()
    monkeypatch.setattr(team, "_WORTH_A_TEAM", 1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(shape, dtype=torch.float32, last=False, channel_dim=1, affine=True, offset=0.0):
    """x, weight, bias, residual and upstream gradient."""
    x, residual, grad = (torch.randn(shape, dtype=dtype) for _ in range(3))
    x = x + offset
    if last:
        x, residual, grad = (t.contiguous(memory_format=LAST[len(shape)]) for t in (x, residual, grad))
    channels = shape[channel_dim]
    weight = torch.randn(channels, dtype=dtype) if affine else None
    bias = torch.randn(channels, dtype=dtype) if affine else None
    return x, weight, bias, residual, grad


def by_kernel(x, weight, bias, residual, grad, activation=None, channel_dim=1, running=None):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    assert choose(x, channel_dim % x.ndim, (weight, bias), residual) is cpu
    options = {
        "eps": EPS, "channel_dim": channel_dim % x.ndim, "activation": activation, "residual": residual,
    }  # fmt: skip
    if running is None:
        y, moments = cpu.training(x, weight, bias, **options)
        mean, var = moments.mean, moments.var()
    else:
        y, (mean, var) = cpu.inference(x, *running, weight, bias, **options), running
    y.backward(grad)
    return [y.detach(), mean, var, *[None if t is None else t.grad for t in leaves]]


KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3), "hardsigmoid": (-3, 3)}
NAMES = ("y", "mean", "var", "x", "weight", "bias", "residual")


def agree(actual, expected, dtype, factor=1.0, term=0.0):
    """`term` is the size of the terms that cancel in a gradient of x."""
    for name, got, wanted in zip(NAMES, actual, expected, strict=True):
        if wanted is None:
            assert got is None, name
            continue
        scale = max(wanted.abs().max().item(), 0.1, term if name == "x" else 0.0)
        if name in ("weight", "bias"):
            scale = max(scale, 20.0)  # sums of many terms that cancel
        atol = TOLERANCE[dtype] * factor * scale
        torch.testing.assert_close(
            got.double(), wanted, rtol=0, atol=atol, msg=lambda message, name=name: f"{name}: {message}"
        )


def size_of_terms(weight, grad, var):
    """Of `weight * grad / std`, which is about nothing in the end where a batch has two values."""
    scale = torch.rsqrt(var.min() + EPS).item() * grad.abs().max().item()
    return scale * (1.0 if weight is None else weight.abs().max().item())


def check(shape, dtype=torch.float32, activation=None, with_residual=False, running=False, **options):
    channel_dim = options.get("channel_dim", 1)
    x, weight, bias, residual, grad = inputs(shape, dtype, **options)
    residual = residual if with_residual else None
    statistics = None
    if running:
        channels = shape[channel_dim]
        statistics = (torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5)
    # At a kink, rounding decides on which side a value is: no gradient comes from there.
    for kink in KINKS.get(activation, ()):
        z = by_definition(x, weight, bias, residual, grad, None, channel_dim, statistics)[0]
        grad = grad.masked_fill((z - kink).abs() < 1e-5, 0)
    call = (x, weight, bias, residual, grad, activation, channel_dim, statistics)
    expected = by_definition(*call)
    agree(by_kernel(*call), expected, dtype, term=size_of_terms(weight, grad, expected[2]))


# Shapes on both sides of every block, tile and choice of kernel.

BLOCK, SHORT, WIDE = 4096, 256, 64
POSITIONS = [1, 2, 3, 31, 127, SHORT - 1, SHORT, SHORT + 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("samples", "channels"), [(1, 1), (2, 3), (3, 2), (7, 5)])
def test_contiguous_across_blocks(samples, channels, positions):
    if samples * positions > 1:
        check((samples, channels, positions))
        check((samples, channels, positions), activation="relu", running=True)


GROUP_CHANNELS, GROUP_POSITIONS = [1, 2, 3, 7, 8, 9, 16, 17, 33, 146, 147], [4, 49, 100, 1024, 1025]
GROUP_SAMPLES = (1, 2, 4, 5, 31, 32, 41)


# Every pair of channels, positions and samples: two of the samples for each pair of the others.
@pytest.mark.parametrize(("i", "channels"), enumerate(GROUP_CHANNELS))
@pytest.mark.parametrize(("j", "positions"), enumerate(GROUP_POSITIONS))
def test_groups_of_short_runs(i, channels, j, positions):
    for samples in (GROUP_SAMPLES[(i + 2 * j + k) % len(GROUP_SAMPLES)] for k in range(2)):
        check((samples, channels, positions), activation="relu", with_residual=samples % 2 == 0)


@pytest.mark.parametrize("channels", [1, 2, 3, 31, WIDE - 1, WIDE, WIDE + 1, 511, 512, 513, 1031])
def test_rows_across_tiles(channels):
    for rows in (2, 3, 4, 5, 31, 32, 33, 263):
        check((rows, channels), activation="relu")
    check((2, channels, 5, 7), last=True)
    check((2, channels, 3, 5, 1), last=True, running=True)
    check((3, 11, channels), channel_dim=-1, with_residual=True, activation="silu")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 150), (4, 9, 6, 6), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("last", [False, True])
def test_dtypes_ranks_and_affine(shape, dtype, last):
    last = last and len(shape) in LAST
    for affine in (True, False):
        for running in (True, False):
            check(shape, dtype, affine=affine, running=running, last=last)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", [*sorted(filter(None, FUSED)), "softplus"])
def test_activations(activation, dtype):
    # Each combination is a loop of its own to compile: half of them in one dtype, the others in the other,
    # every pair of layout, residual and statistics in both.
    odd = dtype == torch.float64
    if activation == "hardsigmoid":
        dtype = torch.float32  # torch's own slope in float64 is 1/6 in float32
    shapes = [((5, 9, 7, 7), False), ((3, 5, 13, 13), False), ((3, 5, 13, 13), True)]
    for i, (shape, last) in enumerate(shapes):
        for with_residual in (False, True):
            running = (i + with_residual + odd) % 2 == 1
            check(shape, dtype, activation, with_residual, last=last, running=running)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", sorted(filter(None, FUSED)))
def test_activations_over_the_whole_line(activation, dtype):
    z = torch.cat(
        [torch.linspace(-120, 120, 100_001), torch.randn(1000) * 1e-4, torch.tensor([-0.0, 1e30, -1e30])]
    )
    z = z.to(dtype)[:, None].requires_grad_()
    mean, var = torch.zeros(1, dtype=dtype), torch.full((1,), 1 - 1e-12, dtype=dtype)
    y = cpu.inference(z, mean, var, None, None, eps=1e-12, channel_dim=1, activation=activation)
    y.sum().backward()
    wide = z.detach().double().requires_grad_()
    wanted = reference.ACTIVATIONS[activation](wide)
    wanted.sum().backward()
    digits = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=digits, atol=digits)
    if activation == "hardsigmoid":
        digits = 1e-7
    torch.testing.assert_close(z.grad.double(), wide.grad, rtol=2 * digits, atol=2 * digits)
    nan = torch.full((40, 1), torch.nan, dtype=dtype)
    y = cpu.inference(nan, mean, var, None, None, eps=EPS, channel_dim=1, activation=activation)
    assert y.isnan().all()


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (1,), (2,), (3,), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("running", [False, True])
def test_gradients_of_some_inputs(wanted, activation, running):
    for shape in [(4, 5, 200), (6, 9, 7, 7), (40, 6)]:
        x, weight, bias, residual, grad = inputs(shape, torch.float64)
        statistics = (torch.randn(shape[1]).double(), torch.rand(shape[1]).double() + 1) if running else None
        expected = by_definition(x, weight, bias, residual, grad, activation, running=statistics)[3:]
        leaves = [t.clone().requires_grad_(k in wanted) for k, t in enumerate((x, weight, bias, residual))]
        options = {"eps": EPS, "channel_dim": 1, "activation": activation, "residual": leaves[3]}
        if running:
            y = cpu.inference(leaves[0], *statistics, leaves[1], leaves[2], **options)
        else:
            y, _ = cpu.training(leaves[0], leaves[1], leaves[2], **options)
        y.backward(grad)
        for k, leaf in enumerate(leaves):
            if k in wanted:
                torch.testing.assert_close(leaf.grad, expected[k], rtol=0, atol=1e-11)
            else:
                assert leaf.grad is None


# Numbers that are hard to sum.


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
@pytest.mark.parametrize(
    ("shape", "last"), [((8, 3, 50, 50), False), ((64, 9, 7, 7), False), ((8, 12, 20, 20), True)]
)
def test_far_from_zero(shape, last, offset):
    x, weight, bias, _, grad = inputs(shape, last=last, offset=offset)
    _, moments = cpu.training(x, weight, bias, eps=EPS, channel_dim=1)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments.var(), var, rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-7, atol=0)
    agree(
        by_kernel(x, weight, bias, None, grad), by_definition(x, weight, bias, None, grad), torch.float32, 3
    )


HARD = [((4, 3, 40, 40), False), ((16, 9, 7, 7), False), ((4, 5, 20, 20), True), ((50, 70), False)]


@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize("kind", ["huge", "tiny", "zero", "gradient"])
def test_values_whose_sums_overflow_or_underflow(shape, last, kind):
    x, weight, bias, _, grad = inputs(shape, last=last)
    if kind == "gradient":
        x, grad = x * 1e10, grad * 1e29
    else:
        x *= {"huge": 1e30, "tiny": 1e-41, "zero": 0.0}[kind]
    got = by_kernel(x, weight, bias, None, grad)
    wanted = by_definition(x, weight, bias, None, grad)
    for name, a, b in zip(NAMES[:-1], got[:-1], wanted[:-1], strict=True):
        if name == "x" and kind == "huge":
            continue  # docs/design.md, known limits: its coefficients are below float32
        a, b = a.float().double(), b.float().double()
        atol = 2e-5 * b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=atol + 1e-38, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize(("shape", "last"), HARD)
def test_subnormals_are_not_flushed(shape, last):
    x, _, _, _, grad = inputs(shape, last=last)
    x *= 1e-41
    got = by_kernel(x, None, None, None, grad)
    wanted = by_definition(x, None, None, None, grad)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=0, atol=1e-42)
    assert wanted[0].abs().max() > 1e-39
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=1e-45)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "last"), HARD)
def test_running_statistics_far_from_zero(shape, last, dtype):
    x, weight, bias, residual, grad = inputs(shape, dtype, last, offset=1e4)
    running = torch.randn(shape[1]).to(dtype) + 1e4, torch.rand(shape[1]).to(dtype) + 0.5
    call = (x, weight, bias, residual, grad, "silu", 1, running)
    agree(by_kernel(*call), by_definition(*call), dtype)


@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize("constant", [1e-41, 0.1, -1e4, 1e18, 3e38])
def test_a_constant_has_no_variance(shape, last, constant):
    x = torch.full(shape, constant)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y, moments = cpu.training(x, None, None, eps=EPS, channel_dim=1)
    assert (moments.mean == x.double().flatten()[0]).all()
    assert (moments.m2 == 0).all()
    assert (y == 0).all()


@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize("kind", ["nan", "inf", "both infs", "one nan", "one inf"])
def test_nan_and_inf_go_where_torch_lets_them(shape, last, kind):
    x, weight, bias, _, grad = inputs(shape, last=last)
    value = torch.nan if "nan" in kind else torch.inf
    if kind.startswith("one"):
        x[1, 1].view(-1)[-1] = value
    else:
        x[1, 1] = value
        x[0, 1] = -torch.inf if kind == "both infs" else 0.0
    leaves = [[t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2)]
    found = []
    for kernel, (x, weight, bias) in zip((cpu, native), leaves, strict=True):
        y, moments = kernel.training(x, weight, bias, eps=EPS, channel_dim=1)
        y.backward(grad)
        found.append([y, moments.mean, moments.m2, x.grad, weight.grad, bias.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("activation", [None, *sorted(filter(None, FUSED))])
@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_gradient_that_is_nan_or_inf_goes_where_torch_lets_it(shape, last, activation, training):
    """Not where the slope of a piecewise activation is 0; inf may become NaN on the way."""
    x, weight, bias, residual, grad = inputs(shape, last=last)
    mean, var = torch.randn(shape[1]), torch.rand(shape[1]) + 0.5
    for value, with_residual in itertools.product((torch.nan, torch.inf), (False, True)):
        grad[1] = value
        found = []
        for kernel in (cpu, native):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)[: 3 + with_residual]]
            options = {
                "eps": EPS, "channel_dim": 1, "activation": activation,
                "residual": leaves[3] if with_residual else None,
            }  # fmt: skip
            if training:
                y, _ = kernel.training(*leaves[:3], **options)
            else:
                y = kernel.inference(leaves[0], mean, var, *leaves[1:3], **options)
            y.backward(grad)
            found.append([leaf.grad for leaf in leaves])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert not found[0][0].isfinite().all()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(data):
    rank = data.draw(st.integers(2, 5))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank)))
    channel_dim = data.draw(st.sampled_from([1, rank - 1]))
    if torch.Size(shape).numel() <= shape[channel_dim]:
        return
    check(
        shape,
        data.draw(st.sampled_from(list(TOLERANCE))),
        data.draw(st.sampled_from([None, "relu", "tanh"])),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
        channel_dim=channel_dim,
        last=channel_dim == 1 and rank in LAST and data.draw(st.booleans()),
        affine=data.draw(st.booleans()),
    )


# Statistics that move, and the layers.


@pytest.mark.parametrize(
    ("rank", "shape"), [(1, (40, 7)), (1, (6, 7, 30)), (2, (4, 7, 9, 9)), (3, (2, 7, 3, 4, 5))]
)
def test_a_layer_equals_torch_nn(rank, shape):
    theirs, ours = (getattr(module, f"BatchNorm{rank}d")(7).double() for module in (nn, bn))
    for step, train in enumerate([True, True, False, True]):
        x = torch.randn(shape, dtype=torch.float64) * (step + 1) + step
        theirs.train(train), ours.train(train)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)


def test_buffers_may_be_overwritten_before_the_backward_pass():
    layer = bn.BatchNorm2d(5)
    x, grad = torch.randn(2, 4, 5, 9, 9)
    for train in (True, False):
        layer.train(train)
        layer.zero_grad()
        layer(x).backward(grad)
        wanted = layer.weight.grad.clone()
        layer.zero_grad()
        y = layer(x)
        layer.running_mean.add_(1)
        layer.running_var.mul_(2)
        y.backward(grad)
        torch.testing.assert_close(layer.weight.grad, wanted, rtol=0, atol=0)


# Autograd.


@pytest.mark.parametrize("activation", [None, "silu", "relu"])
@pytest.mark.parametrize("shape", [(3, 2, 130), (3, 4, 5), (7, 3)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck(shape, activation, with_residual):
    x, weight, bias, residual, _ = inputs(shape, torch.float64)
    tensors = [t.requires_grad_() for t in (x, weight, bias, residual)[: 4 if with_residual else 3]]
    running = (torch.randn(shape[1]).double(), torch.rand(shape[1]).double() + 1)

    def train(x, weight, bias, residual=None):
        return cpu.training(
            x, weight, bias, eps=EPS, channel_dim=1, activation=activation, residual=residual
        )[0]

    def evaluate(x, weight, bias, residual=None):
        options = {"eps": EPS, "channel_dim": 1, "activation": activation, "residual": residual}
        return cpu.inference(x, *running, weight, bias, **options)

    fast = shape[-1] == 130
    for function in (train, evaluate):
        assert gradcheck(function, tensors, check_batched_grad=True, fast_mode=fast)
        assert gradgradcheck(function, tensors, fast_mode=fast, atol=1e-4)


LAYOUTS = [
    ((4, 5, 200), False),
    ((6, 9, 7, 7), False),
    ((6, 9, 3, 3), False),
    ((6, 9, 7, 7), True),
    ((40, 6), False),
]


@pytest.mark.parametrize(("shape", "last"), LAYOUTS)
def test_backward_passes_again_and_odd_upstream_gradients(shape, last):
    x, weight, bias, _, grad = inputs(shape, torch.float64, last)
    x.requires_grad_()
    y, _ = cpu.training(x, weight, bias, eps=EPS, channel_dim=1, activation="relu")
    first, second, strided = (
        torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
        for upstream in (grad, grad, scattered(grad))
    )
    assert torch.equal(first, second)
    assert torch.equal(first, strided)
    ones, expanded = (
        torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
        for upstream in (torch.ones_like(y), torch.ones((), dtype=y.dtype).expand_as(y))
    )
    assert torch.equal(ones, expanded)


def scattered(tensor):
    """The same numbers, with others between them, in the reverse order of dimensions."""
    reverse = [*range(tensor.ndim)][::-1]
    found = torch.stack([tensor.permute(reverse).contiguous()] * 2, -1)[..., 0].permute(reverse)
    assert torch.equal(found, tensor)
    return found


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("shape", "last"), LAYOUTS)
def test_a_residual_in_another_layout(shape, last, activation):
    x, weight, bias, residual, grad = inputs(shape, torch.float64, last)
    found = []
    for other in (residual, scattered(residual)):
        leaf = other.requires_grad_()
        y, _ = cpu.training(x, weight, bias, eps=EPS, channel_dim=1, activation=activation, residual=leaf)
        assert y.stride() == x.stride()
        found.append((y, torch.autograd.grad(y, leaf, grad)[0]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_tensors_changed_in_place():
    x, weight, bias, _, grad = inputs((4, 5, 200), torch.float64)
    weight.requires_grad_()
    y, _ = cpu.training(x, weight, bias, eps=EPS, channel_dim=1)
    (wanted,) = torch.autograd.grad(y, weight, grad, retain_graph=True)
    weight.data.mul_(2)
    assert torch.equal(torch.autograd.grad(y, weight, grad, retain_graph=True)[0], wanted)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, weight, grad, create_graph=True)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


# Threads and processes.


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(threads, count):
    threads(count)
    assert team.size(100) == count
    shapes = [(2, 3, 50, 50), (9, 2, 300), (8, 17, 7, 7), (4, 5, 20, 20), (70, 9), (1, 1, 2)]
    for shape in shapes:
        last = shape == (4, 5, 20, 20)
        check(shape, activation="relu", with_residual=True, last=last)
        check(shape, activation="tanh", running=True, last=last)


@pytest.fixture
def dirty_memory(monkeypatch):
    """A function that fills all memory which kernels are to write before they read it, from now on."""
    empty_like, new_table, empty = cpu.empty_like, launch.new_table, torch.empty

    def fill(value):
        launch._work_memory(100_000)
        launch._scratch.memory.fill_(value)
        monkeypatch.setattr(cpu, "empty_like", lambda x: empty_like(x).fill_(value))
        monkeypatch.setattr(launch, "new_table", lambda plan: new_table(plan).fill_(value))
        monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(value))

    return fill


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("relu", True), ("silu", True)])
@pytest.mark.parametrize(("shape", "last"), LAYOUTS)
def test_the_same_bits_every_time(threads, dirty_memory, shape, last, activation, with_residual, count):
    """Whatever memory held before: an uninitialised number that is read would be in the results."""
    threads(count)
    x, weight, bias, residual, grad = inputs(shape, last=last)
    running = torch.randn(shape[1]), torch.rand(shape[1]) + 0.5
    for statistics in (None, running):
        found = []
        for value in (0.0, torch.nan, 1e30):
            dirty_memory(value)
            found.append(
                by_kernel(
                    x, weight, bias, residual if with_residual else None, grad, activation, running=statistics
                )
            )
        for results in zip(*found, strict=True):
            assert results[0] is None or all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("shape", "last"), LAYOUTS)
def test_an_output_is_built_again_to_the_bit(threads, shape, last, count):
    """Whatever the number of threads is by then."""
    threads(count)
    x, weight, bias, residual, _ = inputs(shape, last=last)
    call = cpu._Call(x, 1, fields.OF_BATCH, EPS, "silu", residual)
    y = call.run(x, weight, bias, residual)
    for later in (1, 2, 3):
        threads(later)
        assert torch.equal(call.again(x, residual), y)


def test_fewer_threads_than_were_asked_for():
    """As where the environment limits them."""
    code = """
import torch
from batchnorm.kernels import cpu, reference
from batchnorm.kernels.cpu import team
torch.set_num_threads(3)
team._WORTH_A_TEAM, cpu.pays = 1, lambda *call: True
for shape in [(4, 3, 40, 40), (2, 4, 50, 50), (16, 9, 3, 3), (50, 70), (5000, 3)]:
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    found = []
    for kernel in (cpu, reference):
        leaf = x.clone().requires_grad_()
        y, moments = kernel.training(leaf, None, None, eps=1e-5, channel_dim=1, activation="silu")
        y.backward(grad)
        found.append((y, moments.mean, moments.m2, leaf.grad))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
"""
    in_process(code, OMP_THREAD_LIMIT="2")


@pytest.mark.parametrize(("shape", "last"), LAYOUTS)
def test_eight_python_threads_at_once(threads, shape, last):
    """Each has scratch memory of its own, and a team."""
    threads(2)
    work = [inputs((shape[0] + k, *shape[1:]), last=last) for k in range(8)]
    alone = [by_kernel(*tensors, "silu") for tensors in work]
    all_there, wrong, done = threading.Barrier(8), [], []

    def run(tensors, wanted):
        all_there.wait()
        for _ in range(20):
            if not all(map(torch.equal, by_kernel(*tensors, "silu"), wanted)):
                wrong.append(tensors[0].shape)
        done.append(tensors[0].shape)

    runners = [threading.Thread(target=run, args=pair) for pair in zip(work, alone, strict=True)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not wrong
    assert len(done) == 8  # none of them has raised


def in_process(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env={**os.environ, **environment}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


STEP = (
    "x = torch.randn(16, 8, 50, 50, requires_grad=True);"
    " bn.BatchNorm2d(8, activation='relu')(x).sum().backward();"
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child():
    # Nothing of torch's own is computed in the child on as many values: it is torch that would hang there.
    code = """
import os, signal, torch, batchnorm as bn
torch.set_num_threads(2)
layer = bn.BatchNorm2d(8, activation="relu")
x, grad = torch.randn(2, 16, 8, 50, 50)
x.requires_grad_()
layer(x).backward(grad)
wanted = layer.weight.grad.clone()
child = os.fork()
if child == 0:
    signal.alarm(60)  # not for ever
    layer.weight.grad = x.grad = None
    layer(x).backward(grad)
    os._exit(0 if torch.allclose(layer.weight.grad, wanted, rtol=1e-4, atol=1e-3) else 1)
assert os.waitpid(child, 0)[1] == 0
layer(x).backward(grad)
"""
    in_process(code)


# Compiled code on disk.


def test_a_warm_cache_does_without_numba(tmp_path):
    code = f"import sys, torch, batchnorm as bn; {STEP} print('numba' in sys.modules)"
    assert in_process(code, BATCHNORM_CACHE=str(tmp_path)).strip() == "True"
    assert in_process(code, BATCHNORM_CACHE=str(tmp_path)).strip() == "False"
    files = sorted(tmp_path.iterdir())
    assert files
    assert {file.suffix for file in files} == {".o"}


def small_function(name):
    def build():
        import numpy as np

        from batchnorm.kernels.cpu import runs

        return runs.apply_runs(np.float32, None, False)

    return machine_code.load(name, build, {})


@pytest.mark.parametrize(
    "damage", [lambda c: b"", lambda c: c[:-7], lambda c: c[:-1] + b"x", lambda c: b"y" + c[1:]]
)
def test_a_damaged_file_is_compiled_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path))
    assert small_function("small")
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert small_function("small")
    again = file.read_bytes()
    assert again[:32] == hashlib.sha256(again[32:]).digest()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_file_that_others_can_write_is_not_run(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path))
    assert small_function("small")
    (file,) = tmp_path.iterdir()
    file.chmod(mode)
    assert small_function("small")
    assert file.stat().st_mode & 0o777 == 0o600  # compiled and written again


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_a_file_of_somebody_else_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path))
    assert small_function("small")
    (file,) = tmp_path.iterdir()
    written, status = file.stat().st_mtime_ns, os.fstat
    assert small_function("small")
    assert file.stat().st_mtime_ns == written

    def of_a_stranger(descriptor):
        found = list(status(descriptor))
        found[stat.ST_UID] = os.getuid() + 1
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", of_a_stranger)
    assert small_function("small")
    assert file.stat().st_mtime_ns > written


def test_no_home_to_keep_machine_code_in(monkeypatch):
    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BATCHNORM_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert machine_code.cache_folder() is None
    assert small_function("small")


def test_a_cache_that_is_read_only(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError("read-only")

    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o555)
    if os.access(tmp_path / "cache", os.W_OK):  # root writes wherever it likes
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    assert small_function("small")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "some" / "where"))
    assert small_function("small")
    assert [file.suffix for file in (tmp_path / "some" / "where").iterdir()] == [".o"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("BATCHNORM_CACHE", str(blocked / "below"))
    assert small_function("small")
    assert blocked.read_text() == "not a folder"


def test_a_broken_compiler_is_said_once(monkeypatch):
    def broken(*arguments):
        raise OSError("no compiler")

    monkeypatch.setattr(machine_code, "load", broken)
    cpu._work.cache_clear()
    plan_module.function.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="no compiler"):
            assert choose(torch.randn(4, 3), 1) is native
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(torch.randn(4, 3), 1) is native
    finally:
        cpu._work.cache_clear()


# Where they stand back.


def test_the_choice(monkeypatch):
    x, weight = torch.randn(4, 6, 5, 5), torch.ones(6)
    assert choose(x, 1, (weight, None)) is cpu
    assert choose(x.contiguous(memory_format=torch.channels_last), 1) is cpu
    assert choose(x, 3) is cpu
    for other in (x[:, :, ::2], x.transpose(0, 1), x.expand(2, 4, 6, 5, 5), x.bfloat16(), x.half()):
        assert choose(other, 1) is not cpu
    assert choose(x, 1, (weight.double(),)) is reference
    assert choose(x, 1, (weight,), x.double()) is native
    assert choose(x[:0], 1) is reference
    with torch._subclasses.FakeTensorMode() as mode:
        assert choose(mode.from_tensor(x), 1) is not cpu
    with forward_ad.dual_level():
        assert choose(x, 1) is not cpu
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(x, 1) is native
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(cpu, "pays", lambda *call: False)
    assert choose(x, 1) is native


@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (8, 256, 28, 28), (4096, 256)])
def test_variances_of_rows_far_from_zero(monkeypatch, shape):
    """torch's operator for channels_last and (N, C), which sums in float32, is off by 1e-4 and more here."""
    monkeypatch.undo()
    x = torch.randn(shape) + 1e4
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    layer = bn.BatchNorm2d(shape[1]) if x.ndim == 4 else bn.BatchNorm1d(shape[1])
    layer.momentum = 1.0
    for wants_gradient in (False, True):
        layer(x.clone().requires_grad_(wants_gradient))
        others = [dim for dim in range(x.ndim) if dim != 1]
        torch.testing.assert_close(layer.running_var.double(), x.double().var(others), rtol=1e-5, atol=0.0)


def test_the_choice_by_size(monkeypatch):
    monkeypatch.undo()
    fused = {"activation": "relu"}

    def chosen(values, channels_last=False, **options):
        x = torch.randn(values // 64, 1, 8, 8).expand(-1, 2, -1, -1).contiguous()[: values // 128]
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        assert x.numel() == values
        return choose(x, 1, **options)

    assert chosen(65536) is chosen(32768, **fused) is cpu
    assert chosen(65536, True) is chosen(4194304, True) is choose(torch.randn(64, 1024), 1) is cpu
    assert chosen(65408) is chosen(32640, **fused) is native
    with torch.no_grad():
        assert chosen(4096) is cpu
        assert chosen(3968) is native
    assert chosen(131072, training=False, **fused) is chosen(131072, True, training=False) is cpu
    assert chosen(130944, training=False, **fused) is chosen(1048576, training=False) is native


def test_under_transforms_and_compilers():
    x = torch.randn(4, 6, 5, 5)
    wanted = bn.batch_norm(x, activation="relu")[0]
    got = torch.func.vmap(lambda part: bn.batch_norm(part, activation="relu")[0])(x[None])
    torch.testing.assert_close(got[0], wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(bn.BatchNorm2d(6).eval(), x)
    torch.testing.assert_close(traced(x), bn.BatchNorm2d(6).eval()(x))
    compiled = torch.compile(bn.BatchNorm2d(6, activation="relu"), backend="eager")
    torch.testing.assert_close(compiled(x), wanted)
    torch._dynamo.reset()
