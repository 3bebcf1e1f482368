"""The CPU kernels on any number of threads, in Python's threads and in a forked child."""

import os
import threading

import pytest
import torch

from batchnorm.kernels import cpu
from batchnorm.kernels.choice import CALLS
from batchnorm.kernels.cpu import fields, launch, team
from tests.kernels.cpu_checks import CPU, LAYOUTS, by_kernel, check, in_process, inputs
from tests.kernels.definition import EPS

pytestmark = CPU


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
    makers = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def dirty(made, value):
        return made.fill_(value if made.is_floating_point() else -bool(value))

    def fill(value):
        launch._work_memory(100_000)
        launch._scratch.memory.fill_(value)
        for name, make in makers.items():
            monkeypatch.setattr(
                torch, name, lambda *of, _make=make, **options: dirty(_make(*of, **options), value)
            )

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
    call = cpu.Call(x, 1, fields.OF_BATCH, EPS, "silu", residual)
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("calls", [1, CALLS], ids=["first call", "kept choice"])
def test_a_forked_child(calls):
    # Nothing of torch's own is computed in the child on as many values: it is torch that would hang there.
    code = f"""
import os, signal, torch, batchnorm as bn
torch.set_num_threads(2)
layer = bn.BatchNorm2d(8, activation="relu")
x, grad = torch.randn(2, 16, 8, 50, 50)
x.requires_grad_()
for _ in range({calls}):
    layer.weight.grad = x.grad = None
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
