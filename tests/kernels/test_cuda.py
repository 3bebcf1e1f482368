"""The Triton kernels on a GPU, against the definition in float64: every layout, dtype, activation and size.

`pytest -m gpu` runs these; without a GPU they are skipped, and `test_cuda_interpreted.py` runs the kernels.
"""

import copy
import threading

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.kernels import choose, cuda, native, reference
from batchnorm.kernels.autograd import FUSED
from batchnorm.kernels.cuda import thresholds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(torch.cuda.is_available() and not cuda._work(), reason="Triton does not work here"),
]

EPS = 1e-5
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ACTIVATIONS = [None, *sorted(filter(None, FUSED))]


@pytest.fixture(autouse=True)
def _every_size(monkeypatch):
    monkeypatch.setattr(thresholds, "LEAST_VALUES", dict.fromkeys(thresholds.KINDS, 1))
    torch.manual_seed(0)


def inputs(shape, dtype, last=False, affine=True, offset=0.0):
    """x, weight, bias, residual and upstream gradient."""
    x, residual, grad = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
    x = x + offset
    if last:
        layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x, residual, grad = (t.contiguous(memory_format=layout) for t in (x, residual, grad))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.randn(shape[1], device="cuda", dtype=wide) if affine else None for _ in range(2))
    return x, weight, bias, residual, grad


def results(train, x, weight, bias, residual, grad, activation):
    """Output, mean, variance and gradients."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    options = {"eps": EPS, "channel_dim": 1, "activation": activation, "residual": residual}
    y, moments = train(x, weight, bias, **options)
    y.backward(grad)
    gradients = [None if t is None else t.grad for t in leaves]
    return [y.detach(), moments.mean, moments.var(), *gradients]


def check(shape, dtype=torch.float32, activation=None, with_residual=False, factor=1.0, **options):
    x, weight, bias, residual, grad = inputs(shape, dtype, **options)
    tensors = x, weight, bias, residual if with_residual else None, grad
    actual = results(cuda.training, *tensors, activation)
    wide = [None if t is None else t.double() for t in tensors]
    expected = results(reference.training, *wide, activation)
    for got, wanted in zip(actual, expected, strict=True):
        if wanted is None:
            assert got is None
            continue
        scale = max(wanted.abs().max().item(), 20.0 if wanted.ndim == 1 else 1.0)
        tolerance = TOLERANCE[dtype if got.ndim > 1 or dtype == torch.float64 else torch.float32]
        error = (got.double() - wanted).abs().max().item()
        assert error <= tolerance * factor * scale, (error, scale)


SHAPES = [
    (128, 64, 28, 28), (128, 2048, 7, 7), (8, 3, 112, 112), (32, 1000), (4096, 33), (1, 1, 70_001),
    (2, 5, 4096), (2, 5, 4097), (17, 300, 3, 3), (2, 32, 4, 14, 14), (20_000, 8),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("last", [False, True])
def test_shapes_and_dtypes(shape, dtype, last):
    if last and len(shape) < 4:
        pytest.skip("no such layout")
    for with_residual in (False, True):
        check(shape, dtype, "relu", with_residual, last=last)
    check(shape, dtype, last=last, affine=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("last", [False, True])
def test_activations(activation, dtype, last):
    if activation == "hardsigmoid" and dtype == torch.float64:
        pytest.skip("torch's own slope in float64 is 1/6 in float32")
    for shape in [(4, 37, 13, 13), (64, 16, 40, 40)]:
        for with_residual in (False, True):
            check(shape, dtype, activation, with_residual, last=last)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_far_from_zero(last, offset):
    for shape in [(8, 64, 50, 50), (8, 300, 7, 7)]:
        x, *_ = inputs(shape, torch.float32, last, offset=offset)
        moments = cuda.statistics(x, channel_dim=1)
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(moments.var(), var, rtol=1e-5, atol=0)
        torch.testing.assert_close(moments.mean, mean, rtol=1e-9, atol=0)
        check(shape, torch.float32, "relu", last=last, offset=offset, factor=3)


@pytest.mark.parametrize("last", [False, True])
def test_the_same_bits_every_time(last):
    tensors = inputs((64, 48, 30, 30), torch.bfloat16, last)
    first, second = (results(cuda.training, *tensors, "gelu") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(128, 256, 7, 7), (64, 16, 56, 56)])
@pytest.mark.parametrize("last", [False, True])
def test_rebuilt_outputs_are_the_same_to_the_bit(shape, last):
    x, weight, bias, _, _ = inputs(shape, torch.float32, last)
    call = cuda._Call(x, 1, True, EPS, "silu", None)
    y = call.run(x, weight, bias, None)
    assert torch.equal(call.again(x, None), y)


def test_layers_move_their_statistics_as_torchs():
    ours = bn.BatchNorm2d(64, activation="relu", device="cuda")
    theirs = nn.BatchNorm2d(64, device="cuda")
    for _ in range(3):
        x = torch.randn(16, 64, 40, 40, device="cuda")
        assert choose(x, 1, (), None, "relu") is cuda
        torch.testing.assert_close(ours(x), torch.relu(theirs(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    torch.testing.assert_close(ours.eval()(x), torch.relu(theirs.eval()(x)), rtol=1e-5, atol=1e-5)


def test_captured_in_a_cuda_graph():
    layer = bn.BatchNorm2d(64, activation="relu", device="cuda")
    x = torch.randn(16, 64, 40, 40, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x).backward(grad)
    torch.cuda.current_stream().wait_stream(side)
    fresh = copy.deepcopy(layer)
    for leaf in (x, *layer.parameters()):
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(grad)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    fresh.zero_grad()
    other = x.detach().clone().requires_grad_()
    expected = fresh(other)
    expected.backward(grad)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=0)
    torch.testing.assert_close(dict(layer.state_dict()), dict(fresh.state_dict()))


def test_under_autocast_and_torch_compile():
    net = nn.Sequential(
        nn.Conv2d(8, 32, 3, device="cuda"), bn.BatchNorm2d(32, activation="relu", device="cuda")
    )
    x = torch.randn(32, 8, 42, 42, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = net(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    eager = net(x)
    torch.testing.assert_close(torch.compile(net)(x), eager, rtol=1e-2, atol=1e-2)


def test_streams_and_threads():
    x, weight, bias, residual, grad = inputs((32, 64, 30, 30), torch.float32)
    expected = results(cuda.training, x, weight, bias, residual, grad, "relu")
    torch.cuda.synchronize()
    found = {}

    def run(name):
        with torch.cuda.stream(torch.cuda.Stream()):
            found[name] = results(cuda.training, x, weight, bias, residual, grad, "relu")
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for actual in found.values():
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
def test_on_a_gpu_that_is_not_the_current_one():
    x, weight, bias, residual, grad = inputs((8, 16, 30, 30), torch.float32)
    expected = results(cuda.training, x, weight, bias, residual, grad, "relu")
    there = [t.to("cuda:1") for t in (x, weight, bias, residual, grad)]
    actual = results(cuda.training, *there, "relu")
    assert all(t.device.index == 1 for t in actual)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.to(other.device), other)


@pytest.mark.parametrize("kind", [torch.nan, torch.inf])
def test_nan_and_inf_go_where_torch_lets_them(kind):
    x, weight, bias, _, grad = inputs((8, 6, 20, 20), torch.float32)
    x[3, 2, 1, 1] = kind
    ours, theirs = (results(k.training, x, weight, bias, None, grad, "relu") for k in (cuda, native))
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert torch.equal(one.isnan(), other.isnan())


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("not enough memory")
    for shape in [(2, 16, 2**26 + 4), (2**27 + 8, 17)]:
        x = torch.empty(shape, dtype=torch.float16, device="cuda").normal_()
        y, moments = cuda.training(x, None, None, eps=EPS, channel_dim=1, activation="relu")
        assert (moments.mean.abs() < 1e-2).all()
        assert ((moments.var() - 1).abs() < 1e-2).all()
        last = x[-1, -1].float() if x.ndim == 2 else x[-1, -1, -1].float()
        expected = ((last - moments.mean[-1]) * torch.rsqrt(moments.var()[-1] + EPS)).clamp_min(0)
        torch.testing.assert_close(y.flatten()[-1].double(), expected.double(), rtol=2e-3, atol=2e-3)
        del x, y
