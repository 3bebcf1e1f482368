"""The Triton kernels in Triton's interpreter, on the CPU, against the definition in float64.

Where there is a GPU, `test_cuda.py` runs them on it.
"""

import pytest
import torch

import batchnorm as bn
from batchnorm import kernels
from batchnorm.kernels import cuda, native, reference
from batchnorm.kernels.autograd import FUSED
from batchnorm.kernels.cuda import plan as planning
from batchnorm.kernels.cuda import thresholds
from tests.kernels.cuda_checks import (
    ACTIVATIONS,
    INTERPRETED,
    TOLERANCE,
    WHOLE,
    agree,
    by_kernel,
    check,
    inputs,
)
from tests.kernels.definition import EPS, by_definition

pytestmark = INTERPRETED


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
