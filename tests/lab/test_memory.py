"""Memory probes: they see the hand-written layer's leak, and that the others are flat."""

import pytest
import torch
from torch import nn

from batchnorm.lab.memory import count_graph_nodes, memory_growth

# Per 100 steps of a batch of 16: the leak is about 5,100 KiB in training and 143,000 in testing.
FLAT_KIB = 400


def test_sees_the_handwritten_leak() -> None:
    # What others leave: memory freed in pieces, which the leak would fit without making the process larger.
    pieces = [torch.empty(256) for _ in range(40_000)]
    del pieces[::2]
    growth = memory_growth("handwritten", batch_size=16, steps=100)
    assert growth.graph_nodes == 7000
    assert growth.train_kib > 10 * FLAT_KIB
    assert growth.test_kib > 100 * FLAT_KIB


@pytest.mark.parametrize("norm", ["none", "torch", "batchnorm"])
def test_the_others_are_flat(norm: str) -> None:
    growth = memory_growth(norm, batch_size=16, steps=100)
    assert growth.graph_nodes == 0
    assert growth.train_kib < FLAT_KIB
    assert growth.test_kib < FLAT_KIB


def test_counts_each_node_once() -> None:
    module = nn.Module()
    module.kept = (torch.ones(2, requires_grad=True) * 2 + 1).exp()
    assert count_graph_nodes(module) == 4  # exp, add, mul, and the leaf's accumulator
    module.also_kept = module.kept * 3
    assert count_graph_nodes(module) == 5
