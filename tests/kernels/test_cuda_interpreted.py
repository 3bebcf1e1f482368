"""The Triton kernels in Triton's interpreter, on the CPU, against the definition in float64.

And compiled for GPUs, which needs none. Where there is a GPU, `test_cuda.py` runs them on it.
"""

import os
import subprocess
import sys
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import batchnorm as bn
from batchnorm import distributed, kernels
from batchnorm.kernels import cuda, native, reference
from batchnorm.kernels.autograd import FUSED
from batchnorm.kernels.cuda import plan as planning
from batchnorm.kernels.cuda import thresholds
from batchnorm.lab.bench_probes import held_bytes
from batchnorm.recipes import Recording
from tests.kernels.definition import EPS, by_definition
from tests.kernels.halves import by_halves

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="here test_cuda.py runs them on the GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's: NumPy about inf and NaN
]

# Largest error as a share of the largest value: some roundings.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
ACTIVATIONS = sorted(filter(None, FUSED))


@pytest.fixture(autouse=True)
def cut(monkeypatch):
    """Sets sizes of `plan.py`: by default several small tiles per channel, in two parts and more."""

    def set_sizes(tile=32, row_channels=4, whole=0, programs=10):
        monkeypatch.setattr(planning, "TILE", tile)
        monkeypatch.setattr(planning, "ROW_CHANNELS", row_channels)
        monkeypatch.setattr(planning, "WHOLE_FORWARD", whole)
        monkeypatch.setattr(planning, "WHOLE_BACKWARD", whole)
        monkeypatch.setattr(planning, "PROGRAMS_PER_MULTIPROCESSOR", programs)
        planning.plan.cache_clear()

    set_sizes()
    torch.manual_seed(0)
    yield set_sizes
    planning.plan.cache_clear()


WHOLE = {"tile": 4096, "whole": 1 << 20}


def inputs(shape, dtype=torch.float32, last=False, channel_dim=1, affine=True, offset=0.0, parameters=None):
    """x, weight, bias, residual and upstream gradient."""
    x, residual, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    x = x + offset
    if last:
        x, residual, grad = (t.contiguous(memory_format=LAST[len(shape)]) for t in (x, residual, grad))
    channels = shape[channel_dim]
    wide = parameters or (torch.float64 if dtype == torch.float64 else torch.float32)
    weight, bias = (torch.randn(channels).to(wide) if affine else None for _ in range(2))
    return x, weight, bias, residual, grad


def by_kernel(x, weight, bias, residual, grad, activation=None, channel_dim=1, running=None):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    options = {"eps": EPS, "channel_dim": channel_dim, "activation": activation, "residual": residual}
    if running is None:
        y, moments = cuda.training(x, weight, bias, **options)
        mean, var = moments.mean, moments.var()
    else:
        y, (mean, var) = cuda.inference(x, *running, weight, bias, **options), running
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    y.backward(grad)
    for leaf in leaves:
        assert leaf is None or leaf.grad.dtype == leaf.dtype
    return [y.detach(), mean, var, *[None if t is None else t.grad for t in leaves]]


NAMES = ("y", "mean", "var", "x", "weight", "bias", "residual")


def agree(actual, expected, dtype, factor=1.0):
    for name, got, wanted in zip(NAMES, actual, expected, strict=True):
        if wanted is None:
            assert got is None, name
            continue
        of_numbers = name in ("mean", "var", "weight", "bias")
        tolerance = TOLERANCE[torch.float32 if of_numbers and dtype.itemsize == 2 else dtype]
        if got.dtype.itemsize == 2:
            tolerance = TOLERANCE[got.dtype]
        scale = max(wanted.abs().max().item(), 20.0 if name in ("weight", "bias") else 1.0)
        torch.testing.assert_close(
            got.double(),
            wanted.double(),
            rtol=0,
            atol=tolerance * factor * scale,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def check(shape, dtype=torch.float32, activation=None, with_residual=False, running=False, **options):
    channel_dim = options.get("channel_dim", 1)
    x, weight, bias, residual, grad = inputs(shape, dtype, **options)
    statistics = None
    if running:
        statistics = (torch.randn(shape[channel_dim]), torch.rand(shape[channel_dim]) + 0.5)
    call = (x, weight, bias, residual if with_residual else None, grad, activation, channel_dim, statistics)
    agree(by_kernel(*call), by_definition(*call), dtype)


# Shapes on both sides of every block, and each way to go about them.


@pytest.mark.parametrize(
    ("samples", "positions"), [(33, 1), (2, 7), (5, 8), (3, 31), (2, 32), (3, 33), (1, 70)]
)
def test_contiguous_across_tiles(samples, positions):
    check((samples, 2, positions), activation="relu")


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("rows", [2, 8, 19])
def test_rows_across_tiles(rows, channels):
    check((rows, channels), activation="relu")


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_parts_of_a_channel(cut, programs):
    cut(tile=16, programs=programs)
    check((3, 1, 45))
    check((40, 3))


@pytest.mark.parametrize(("shape", "last"), [((6, 5), False), ((3, 2, 7, 3), False), ((3, 5, 3, 3), True)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tiles_that_hold_all_of_a_channel(cut, shape, last, dtype):
    cut(**WHOLE)
    assert planning.plan(torch.Size(shape), torch.empty(shape).stride(), dtype, 1, 1).whole_backward
    check(shape, dtype, last=last, activation="relu", with_residual=True)
    check(shape, dtype, last=last, affine=False)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "last", "channel_dim"),
    [((6, 5), False, 1), ((3, 2, 7, 3), False, 1), ((3, 5, 3, 3), True, 1), ((2, 3, 2, 3, 2), True, 1),
     ((2, 5, 6), False, 2), ((3, 4, 2), False, 0)],
)  # fmt: skip
def test_dtypes_layouts_and_affine(cut, shape, last, channel_dim, dtype):
    cut(tile=64)
    check(shape, dtype, last=last, channel_dim=channel_dim, activation="relu", with_residual=True)
    check(shape, dtype, last=last, channel_dim=channel_dim, affine=False, running=True)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "softplus"])
def test_activations(cut, activation):
    cut(tile=4096)
    for with_residual in (False, True):
        check((3, 1, 5, 5), torch.float32, activation, with_residual)
        if activation in FUSED:  # else it is torch that rounds once more
            check((3, 2, 5, 5), torch.bfloat16, activation, with_residual, running=True, last=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_the_whole_line(cut, activation, dtype):
    cut(tile=1 << 14)
    z = torch.cat(
        [torch.linspace(-120, 120, 8_001), torch.randn(1000) * 1e-4, torch.tensor([-0.0, 1e30, -1e30])]
    )
    z = z.to(dtype)[:, None].requires_grad_()
    mean, var = torch.zeros(1, dtype=dtype), torch.full((1,), 1 - 1e-12, dtype=dtype)
    y = cuda.inference(z, mean, var, None, None, eps=1e-12, channel_dim=1, activation=activation)
    y.sum().backward()
    wide = z.detach().double().requires_grad_()
    wanted = reference.ACTIVATIONS[activation](wide)
    wanted.sum().backward()
    digits = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=digits, atol=digits)
    if activation == "hardsigmoid":
        digits = 1e-7  # torch's own slope in float64 is 1/6 in float32
    torch.testing.assert_close(z.grad.double(), wide.grad, rtol=2 * digits, atol=2 * digits)
    nan = torch.full((40, 1), torch.nan, dtype=dtype)
    y = cuda.inference(nan, mean, var, None, None, eps=EPS, channel_dim=1, activation=activation)
    assert y.isnan().all()


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("running", "whole"), [(False, False), (False, True), (True, False)])
def test_gradients_of_some_inputs(cut, wanted, activation, running, whole):
    cut(**WHOLE if whole else {"tile": 32})
    x, weight, bias, residual, grad = inputs((4, 1, 9), torch.float64)
    statistics = (torch.randn(1).double(), torch.rand(1).double() + 1) if running else None
    expected = by_definition(x, weight, bias, residual, grad, activation, running=statistics)[3:]
    leaves = [t.clone().requires_grad_(k in wanted) for k, t in enumerate((x, weight, bias, residual))]
    options = {"eps": EPS, "channel_dim": 1, "activation": activation, "residual": leaves[3]}
    if running:
        y = cuda.inference(leaves[0], *statistics, leaves[1], leaves[2], **options)
    else:
        y, _ = cuda.training(leaves[0], leaves[1], leaves[2], **options)
    y.backward(grad)
    for k, leaf in enumerate(leaves):
        if k in wanted:
            torch.testing.assert_close(leaf.grad, expected[k], rtol=0, atol=1e-11)
        else:
            assert leaf.grad is None


# Numbers that are hard to sum.


@pytest.mark.parametrize(("shape", "last"), [((4, 2, 20, 20), False), ((4, 4, 10, 10), True)])
@pytest.mark.parametrize("whole", [False, True])
def test_far_from_zero(cut, shape, last, whole):
    cut(**WHOLE if whole else {"tile": 1024})
    x, weight, bias, _, grad = inputs(shape, last=last, offset=1e4)
    _, moments = cuda.training(x, weight, bias, eps=EPS, channel_dim=1)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments.var(), var, rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-9, atol=0)
    call = x, weight, bias, None, grad
    agree(by_kernel(*call), by_definition(*call), torch.float32, 3)


def test_one_sample_far_from_the_others(cut):
    cut(tile=32)
    x = torch.randn(8, 2, 32) + 1e4
    x[0] = 0  # shifted sums would take this for the mean
    _, moments = cuda.training(x, None, None, eps=EPS, channel_dim=1)
    torch.testing.assert_close(moments.var(), x.double().var((0, 2), correction=0), rtol=1e-6, atol=0)
    ahead = torch.cat([torch.zeros(1, 2, 32), torch.randn(30, 2, 32) + 1e4])
    torch.testing.assert_close(
        cuda.statistics(ahead, channel_dim=1).var(),
        ahead.double().var((0, 2), correction=0),
        rtol=1e-6,
        atol=0,
    )


HARD = [((3, 2, 3, 5), False), ((3, 3, 3, 5), True)]


@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("constant", [1e-41, 0.1, 1e18])
def test_a_constant_has_no_variance(cut, shape, last, whole, constant):
    if whole:
        cut(**WHOLE)
    x = torch.full(shape, constant)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y, moments = cuda.training(x, None, None, eps=EPS, channel_dim=1)
    torch.testing.assert_close(moments.mean, x.double().flatten()[0].expand(shape[1]), rtol=1e-6, atol=0)
    assert (moments.var() >= 0).all()
    assert y.isfinite().all()


@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize(("whole", "activation"), [(False, "relu"), (True, None)])
@pytest.mark.parametrize("kind", ["nan", "inf", "both infs", "one nan", "one inf"])
def test_nan_and_inf_go_where_torch_lets_them(cut, shape, last, whole, kind, activation):
    cut(**WHOLE if whole else {"tile": 64})
    x, weight, bias, _, grad = inputs(shape, last=last)
    value = torch.nan if "nan" in kind else torch.inf
    if kind.startswith("one"):
        x[1, 1].view(-1)[-1] = value
    else:
        x[1, 1] = value
        x[0, 1] = -torch.inf if kind == "both infs" else 0.0
    leaves = [[t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2)]
    found = []
    for kernel, (x, weight, bias) in zip((cuda, native), leaves, strict=True):
        y, moments = kernel.training(x, weight, bias, eps=EPS, channel_dim=1, activation=activation)
        y.backward(grad)
        found.append([y, moments.mean, moments.m2, x.grad, weight.grad, bias.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "hardsigmoid"])
def test_a_gradient_that_is_nan_or_inf_stops_where_the_slope_is_zero(activation):
    x = torch.tensor([[-9.0, 1.0, -9.0], [1.0, -9.0, -9.0]])[:, :, None].repeat(1, 1, 2)
    grad = torch.tensor([torch.nan, torch.inf])[:, None, None].expand_as(x)
    found = []
    for kernel in (cuda, native):
        leaf = x.clone().requires_grad_()
        mean, var = torch.zeros(3), torch.ones(3)
        y = kernel.inference(leaf, mean, var, None, None, eps=EPS, channel_dim=1, activation=activation)
        y.backward(grad)
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=0, equal_nan=True)


# Running statistics, and what is kept.


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_running_statistics_move_as_torchs(cut, dtype, whole):
    if whole:
        cut(**WHOLE)
    x, weight, bias, _, _ = inputs((4, 5, 6), dtype)
    buffers = [torch.randn(5), torch.rand(5) + 0.5, torch.tensor(7)]
    buffers[:2] = [buffer.to(weight.dtype) for buffer in buffers[:2]]
    theirs = [buffer.clone() for buffer in buffers]
    y = cuda.training_and_moving(x, weight, bias, *buffers, 0.1, EPS, 1)
    expected = native.training_and_moving(x, weight, bias, *theirs, 0.1, EPS, 1)
    torch.testing.assert_close(y, expected, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(buffers, theirs, **exact)
    kept = [buffer.clone() for buffer in buffers]
    cuda.training_and_moving(x, weight, bias, None, None, None, 0.1, EPS, 1)
    torch.testing.assert_close(buffers, kept, rtol=0, atol=0)
    cuda.training_and_moving(x, weight, bias, buffers[0], buffers[1], None, 1, EPS, 1)
    torch.testing.assert_close(buffers[0].double(), x.double().mean((0, 2)), rtol=1e-2, atol=1e-2)
    assert buffers[2] == kept[2]


def test_half_precision_parameters_and_statistics():
    x, weight, bias, residual, grad = inputs((4, 3, 6), torch.bfloat16, parameters=torch.bfloat16)
    call = x, weight, bias, residual, grad, "relu"
    agree(by_kernel(*call), by_definition(*call), torch.bfloat16)
    running = torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)
    cuda.training_and_moving(x, weight, bias, *running, None, 0.5, EPS, 1)
    torch.testing.assert_close(running[0].double(), x.double().mean((0, 2)) / 2, rtol=1e-2, atol=1e-2)


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
        kept = y.detach().clone()
    assert torch.equal(z.grad_fn._saved_self, kept)
    z.backward(grad)
    assert leaf.grad.isfinite().all()


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
    y, _ = cuda.training(x, weight, bias, eps=EPS, channel_dim=1, residual=residual)
    assert y.is_contiguous()


def test_the_same_bits_every_time():
    x, weight, bias, residual, grad = inputs((5, 2, 20))
    first, second = (by_kernel(x, weight, bias, residual, grad, "gelu") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# Statistics and application apart.


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_two_processes_give_what_one_does(last, activation, with_residual):
    x, weight, bias, residual, grad = inputs((6, 3, 3, 5), last=last, offset=100.0)
    tensors = x, weight, bias, residual if with_residual else None, grad
    actual = by_halves(cuda, *tensors, eps=EPS, activation=activation, samples=(2,))
    agree(actual, by_definition(*tensors, activation), torch.float32, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_by_halves(dtype):
    for activation, with_residual in (("relu", True), ("silu", True), ("gelu", False)):
        x, weight, bias, residual, grad = inputs((5, 3, 4, 3), dtype)
        tensors = x, weight, bias, residual if with_residual else None, grad
        actual = by_halves(cuda, *tensors, eps=EPS, activation=activation, samples=(2,))
        agree(actual, by_definition(*tensors, activation), dtype)


def test_statistics_of_memory_with_gaps_are_refused():
    with pytest.raises(ValueError, match=r"x\.contiguous\(\)"):
        cuda.statistics(torch.randn(4, 3, 8)[:, :, ::2], channel_dim=1)


@pytest.mark.parametrize("shape", [(2, 1, planning.MOST_VALUES // 2 + 1), (1, planning.MOST_CHANNELS + 1, 2)])
def test_statistics_of_what_int32_cannot_count_are_refused(shape):
    with pytest.raises(ValueError, match=r"at most 1,073,741,824 values .* 134,217,728 channels") as error:
        cuda.statistics(torch.empty(shape, device="meta"), channel_dim=1)
    assert "contiguous" not in str(error.value)


@pytest.fixture
def synchronised_layers(monkeypatch):
    """Layers communicate with another process, which has the same batch; their kernels are these."""
    monkeypatch.setattr(kernels, "cpu", cuda)  # what `choose` takes for tensors that are not on a GPU
    monkeypatch.setattr(cuda, "_work", lambda: True)
    monkeypatch.setattr(thresholds, "LEAST_VALUES", dict.fromkeys(thresholds.KINDS, 1))
    monkeypatch.setattr(distributed, "group_of", lambda sync: object() if sync else None)
    sizes = []

    def add(self, numbers):
        sizes.append(numbers.numel())
        return numbers.mul_(2)

    monkeypatch.setattr(distributed.Processes, "add", add)
    return sizes


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "with_residual"), [("relu", False), ("relu", True), ("silu", True)])
def test_a_synchronised_layer(synchronised_layers, last, dtype, activation, with_residual):
    x, weight, bias, residual, grad = inputs((4, 3, 3, 5), dtype, last=last, offset=10.0)
    layer = bn.BatchNorm2d(3, activation=activation, sync=True, momentum=1.0)
    layer.load_state_dict({**layer.state_dict(), "weight": weight, "bias": bias})
    leaves = [x.requires_grad_(), residual.requires_grad_() if with_residual else None]
    y = layer(*leaves)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    y.backward(grad)
    assert synchronised_layers == [7, 6]
    assert y.grad_fn.table.shape == (cuda._launch().TABLE_ROWS, 3)  # not the CPU kernels'
    mean, var = layer.running_mean, layer.running_var * (119 / 120)  # unbiased, of both batches
    of_residual = residual.grad if with_residual else None
    actual = [y.detach(), mean, var, x.grad, layer.weight.grad, layer.bias.grad, of_residual]
    agree(actual, by_definition(x, weight, bias, leaves[1], grad, activation), dtype, 2)


@pytest.mark.parametrize("activation", ["silu", "leaky_relu", None])
def test_double_backward_of_a_synchronised_layer(synchronised_layers, activation):
    layer = bn.BatchNorm1d(3, activation=activation, sync=True, dtype=torch.float64)
    torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    one = deepcopy(layer)
    one.sync = False
    x, residual = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    found = []
    for network in (layer, one):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        copies = 1 if network is layer else 2  # the other process's losses are in the gradients, too
        y = network(*[torch.cat([leaf] * copies) for leaf in leaves])
        asked = [*leaves, *network.parameters()]
        first = torch.autograd.grad(y.pow(3).sum() / copies, asked, create_graph=True)
        penalty = first[0].square().sum() + first[1].square().sum() + y.square().sum() / copies
        found.append((first, torch.autograd.grad(penalty, asked)))
    assert synchronised_layers == [7, 6, 6, 6]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_synchronised_output_is_built_again_to_the_bit(synchronised_layers, with_residual):
    x, _, _, residual, grad = inputs((4, 3, 9), torch.bfloat16)
    layer = bn.BatchNorm1d(3, activation="silu", sync=True)
    leaf = x.requires_grad_()
    with Recording():
        y = layer(leaf, residual if with_residual else None)
        z = y * y
        kept = y.detach().clone()
    layer.weight.data.add_(1)
    assert torch.equal(z.grad_fn._saved_self, kept)
    z.backward(grad)
    assert leaf.grad.isfinite().all()
    assert synchronised_layers == [7, 6]


# The choice.


def test_what_is_supported(monkeypatch):
    kinds = {kind: 100 if kind.fused else None for kind in thresholds.KINDS}
    monkeypatch.setattr(thresholds, "LEAST_VALUES", kinds)
    monkeypatch.setattr(cuda, "_work", lambda: True)
    x = torch.randn(4, 5, 10)
    assert cuda.supports(x, 1, (), None, "relu")
    assert cuda.supports(x, 1, (torch.ones(5),), x, None)
    assert cuda.supports(x.half(), 1, (torch.ones(5),), x.half(), "relu")
    assert cuda.supports(x.half(), 1, (torch.ones(5).half(),), None, "relu")
    assert not cuda.supports(x, 1)  # torch's is as good
    assert not cuda.supports(x[:1], 1, (), None, "relu")  # small
    assert not cuda.supports(x, 1, (torch.ones(5).double(),), None, "relu")
    assert not cuda.supports(x, 1, (torch.ones(4),), None, "relu")
    assert not cuda.supports(x, 1, (), x.half(), "relu")
    assert not cuda.supports(x[:, :, ::2].repeat(2, 1, 1)[::2], 1, (), None, "relu")
    assert not cuda.supports(torch.empty(0, 5, 10), 1, (), None, "relu")
    with Recording():
        assert cuda.supports(x[:1], 1)
    monkeypatch.setattr(cuda, "_work", lambda: False)
    assert not cuda.supports(x, 1, (), None, "relu")


def test_every_kind_of_call_has_its_own_threshold(monkeypatch):
    monkeypatch.setattr(cuda, "_work", lambda: True)
    x = torch.randn(2, 4, 5, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for chosen in thresholds.KINDS:
        only = dict.fromkeys(thresholds.KINDS) | {chosen: 200}
        monkeypatch.setattr(thresholds, "LEAST_VALUES", only)
        for kind in thresholds.KINDS:
            tensor = (last if kind.rows else x).to(torch.bfloat16 if kind.half else torch.float32)
            activation = "relu" if kind.fused else None
            for values, enough in ((tensor, kind == chosen), (tensor[:1], False)):
                found = cuda.supports(values, 1, (), None, activation, kind.training)
                assert found == enough, (kind, chosen)


def test_the_table_of_thresholds_is_printed_as_it_is_written():
    source = Path(thresholds.__file__).read_text()
    assert thresholds.as_python(thresholds.LEAST_VALUES) in source
    with thresholds.everywhere(5):
        assert thresholds.worthwhile(thresholds.KINDS[-1], 5)
        assert not thresholds.worthwhile(thresholds.KINDS[-1], 4)
    assert thresholds.as_python(thresholds.LEAST_VALUES) in source


def test_what_int32_cannot_count_is_left_to_torch():
    def has_plan(shape, last=False):
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(shape, dtype=torch.float16, device="meta", memory_format=layout)
        return planning.plan(x.shape, x.stride(), x.dtype, 1, 132) is not None

    for last in (False, True):
        assert has_plan((2**14, 2, 2**8, 2**8), last)
        assert not has_plan((2**14, 2, 2**8, 2**8 + 1), last)
    assert not has_plan((2**31, 1))
    assert not has_plan((4, 2**28))


def test_the_first_call_in_a_capture_leaves_the_question_open(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cuda, "_tried", cache(lambda: True))
    assert not cuda._work()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cuda._work()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda._work()


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


def test_a_machine_where_they_do_not_work_says_so_once(monkeypatch):
    def fail():
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(cuda, "_launch", fail)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda._tried.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="GPU kernels cannot be compiled, torch's own do"):
            assert not cuda._work()
        assert not cuda._work()
    finally:
        cuda._tried.cache_clear()


def test_layers_by_these_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "cpu", cuda)  # what `choose` takes for tensors that are not on a GPU
    monkeypatch.setattr(cuda, "_work", lambda: True)
    monkeypatch.setattr(thresholds, "LEAST_VALUES", dict.fromkeys(thresholds.KINDS, 1))
    ours, theirs = bn.BatchNorm2d(3, activation="relu"), torch.nn.BatchNorm2d(3)
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        y, expected = ours(x), torch.relu(theirs(x))
        assert kernels.choose(x, 1, (), None, "relu") is cuda
        torch.testing.assert_close(y, expected)
    assert "_Normalise" in type(y.grad_fn).__name__
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), torch.relu(theirs(x)))
    running = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    y, mean, _ = bn.batch_norm(x, **running, activation="relu")
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, torch.relu(expected))
    torch.testing.assert_close(mean, 0.1 * x.mean((0, 2, 3)))


def test_kernels_compile_for_gpus():
    """To machine code, for which Triton needs no GPU; in a process where nothing is interpreted."""
    assert printed_by("compile_cuda.py") == [66]


def test_calls_compile_as_on_a_gpu_and_not_for_every_batch_size():
    """Through Triton's just-in-time compiler up to the machine code, with a stand-in for the driver."""
    first, more = printed_by("specialise_cuda.py")
    assert first >= 14
    assert more - first <= 2  # of twelve sizes; tiles are powers of 2


def printed_by(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    return [int(word) for word in run.stdout.split() if word.isdecimal()]
