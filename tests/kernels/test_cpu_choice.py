"""When the CPU kernels are chosen, and when they stand back."""

import sys
import warnings

import pytest
import torch
from torch.autograd import forward_ad

import batchnorm as bn
from batchnorm.kernels import choose, cpu, native, reference
from batchnorm.kernels.cpu import machine_code
from tests.kernels.cpu_checks import CPU

pytestmark = CPU


# `cpu.plan` is the function of that name in the module of that name.
plan_module = sys.modules["batchnorm.kernels.cpu.plan"]


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
    fused, gelu = {"activation": "relu"}, {"activation": "gelu"}

    def chosen(values, channels_last=False, positions=64, **options):
        x = torch.randn(values // (2 * positions), 2, positions, 1)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        assert x.numel() == values
        return choose(x, 1, **options)

    assert chosen(32768) is chosen(32768, **fused) is chosen(32768, True, **fused) is cpu
    assert chosen(65536, True) is chosen(4194304, True) is choose(torch.randn(128, 512), 1) is cpu
    assert chosen(32640) is chosen(65408, True) is chosen(32640, **fused) is native
    assert chosen(8192, positions=4) is cpu
    assert chosen(8192, positions=8) is chosen(8184, positions=4) is native
    assert chosen(2097152, training=False) is chosen(524288, True, training=False) is cpu
    assert chosen(2097024, training=False) is chosen(524160, True, training=False) is native
    assert chosen(131072, training=False, **fused) is cpu
    assert chosen(130944, training=False, **fused) is native
    with torch.no_grad():
        assert chosen(4096) is cpu
        assert chosen(3968) is native
        assert chosen(65536, training=False, **fused) is chosen(65536, True, training=False) is cpu
        assert chosen(65408, training=False, **fused) is chosen(1048576, training=False) is native
        assert chosen(4194304, training=False, **gelu) is chosen(4096, **gelu) is cpu
        assert chosen(4194176, training=False, **gelu) is native


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
