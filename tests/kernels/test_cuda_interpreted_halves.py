"""The interpreted Triton kernels' statistics, application and backward apart; synchronised layers by them."""

from copy import deepcopy

import pytest
import torch

import batchnorm as bn
from batchnorm import distributed, kernels
from batchnorm.kernels import cuda
from batchnorm.kernels.cuda import plan as planning
from batchnorm.kernels.cuda import thresholds
from batchnorm.recipes import Recording
from tests.kernels.cuda_checks import INTERPRETED, agree, assert_built_again, inputs
from tests.kernels.definition import EPS, by_definition
from tests.kernels.halves import by_halves

pytestmark = INTERPRETED


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


@pytest.mark.parametrize("shape", [(2, 1, planning.MOST_VALUES // 2 + 1), (1, planning.MOST_CHANNELS + 1, 2)])
def test_statistics_of_what_int32_cannot_count_are_refused(shape):
    with pytest.raises(ValueError, match=r"at most 1,073,741,824 values .* 134,217,728 channels") as error:
        cuda.statistics(torch.empty(shape, device="meta"), channel_dim=1)
    assert "contiguous" not in str(error.value)


def test_statistics_of_memory_with_gaps_are_refused():
    with pytest.raises(ValueError, match=r"x\.contiguous\(\)"):
        cuda.statistics(torch.randn(4, 3, 8)[:, :, ::2], channel_dim=1)


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
    layer.weight.data.add_(1)
    assert_built_again(z.grad_fn._saved_self, y)
    z.backward(grad)
    assert leaf.grad.isfinite().all()
    assert synchronised_layers == [7, 6]
