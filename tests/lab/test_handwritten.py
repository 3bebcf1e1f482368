"""The tutorial's layer: right in its output, and each named fault still there."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from batchnorm.lab.handwritten import HandwrittenBatchNorm
from batchnorm.lab.memory import count_graph_nodes


@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 4, 3)])
def test_training_output_is_batch_norm(shape: tuple[int, ...]) -> None:
    layer = HandwrittenBatchNorm(5, after_convolution=len(shape) == 4)
    x = torch.randn(shape)
    wanted = F.batch_norm(x, None, None, layer.gamma.flatten(), layer.beta.flatten(), True)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_momentum_weighs_the_new_batch() -> None:
    layer = HandwrittenBatchNorm(3, after_convolution=False)
    first, second = torch.randn(2, 16, 3)
    layer(first)
    layer(second)
    mean = 0.9 * second.mean(0) + 0.1 * 0.9 * first.mean(0)
    biased = 0.9 * second.var(0, correction=0) + 0.1 * 0.9 * first.var(0, correction=0)
    torch.testing.assert_close(layer.running_mean[0], mean)
    torch.testing.assert_close(layer.running_var[0], biased)


def test_eval_mode_uses_the_running_statistics() -> None:
    layer = HandwrittenBatchNorm(3, after_convolution=False)
    layer(torch.randn(16, 3))
    layer.eval()
    x = torch.randn(4, 3)
    wanted = (x - layer.running_mean) / torch.sqrt(layer.running_var + 1e-5)
    torch.testing.assert_close(layer(x), wanted)


def test_the_graph_grows_with_every_step() -> None:
    layer = HandwrittenBatchNorm(3, after_convolution=False)
    nodes = []
    for _ in range(20):
        layer(torch.randn(16, 3, requires_grad=True)).sum().backward()
        nodes.append(count_graph_nodes(layer))
    growth = {later - earlier for earlier, later in pairwise(nodes[5:])}
    assert len(growth) == 1
    assert growth.pop() >= 6


def test_the_statistics_are_not_saved_and_do_not_move_with_the_module() -> None:
    layer = HandwrittenBatchNorm(3, after_convolution=True).double()
    assert set(layer.state_dict()) == {"gamma", "beta"}
    assert layer.running_mean.dtype == torch.float32


def test_the_shift_starts_at_one_after_a_convolution() -> None:
    assert HandwrittenBatchNorm(3, after_convolution=True).beta.eq(1).all()
    assert HandwrittenBatchNorm(3, after_convolution=False).beta.eq(0).all()
