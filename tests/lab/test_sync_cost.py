"""Tests of the model of what synchronised layers cost on a network."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

import batchnorm as bn
from batchnorm import distributed
from batchnorm.lab import sync_cost
from batchnorm.lab.sync_cost import (
    Cost,
    Network,
    gathering,
    ours,
    ring_all_gather,
    ring_all_reduce,
    tree_all_gather,
    tree_all_reduce,
)

ALL = (ring_all_reduce, tree_all_reduce, ring_all_gather, tree_all_gather)
PROCESSES = (2, 3, 4, 7, 8, 64, 1000, 100_000)


def test_counts_by_hand() -> None:
    assert ring_all_reduce(4, 100) == Cost(1, 0, 6, 150)
    assert tree_all_reduce(4, 100) == Cost(1, 0, 4, 150)
    assert tree_all_reduce(5, 100) == Cost(1, 0, 6, 160)
    assert ring_all_gather(4, 100) == Cost(1, 0, 3, 300)
    assert tree_all_gather(4, 100) == Cost(1, 0, 2, 300)


def test_counts_by_hand_with_nodes() -> None:
    # 32 processes in 4 nodes of 8: 31 hops of a ring, 3 of them between nodes; chains of 7 and a tree of 4.
    assert ring_all_reduce(32, 32, 8) == Cost(1, 56, 6, 62)
    assert tree_all_reduce(32, 32, 8) == Cost(1, 14, 4, 62)
    assert ring_all_gather(32, 1, 8) == Cost(1, 28, 3, 31)
    assert tree_all_gather(32, 1, 8) == Cost(1, 7, 2, 31)
    assert ring_all_reduce(6, 6, 8) == Cost(1, 10, 0, 10)
    assert tree_all_reduce(6, 6, 8) == Cost(1, 10, 0, 10)


def test_seconds_by_hand() -> None:
    network = Network("", call=100.0, near=1.0, far=10.0, per_byte=0.5)
    assert Cost(2, 3, 4, 8).seconds(network) == 200 + 3 + 40 + 4


@pytest.mark.parametrize("collective", ALL, ids=lambda collective: collective.__name__)
@pytest.mark.parametrize("per_node", [1, 8])
def test_one_process_sends_nothing_and_more_never_send_less(collective: Any, per_node: int) -> None:
    assert collective(1, 1000, per_node) == Cost(1, 0, 0, 0)
    costs = [collective(p, 1000, per_node) for p in PROCESSES]
    for less, more in itertools.pairwise(costs):
        assert more.sent >= less.sent
        assert more.far >= less.far
        assert more.near >= less.near


def test_what_grows_with_the_processes() -> None:
    step = [(p, ours([256], p), gathering([256], p)) for p in PROCESSES]
    for p, all_reduced, gathered in step:
        assert all_reduced.sent < 2 * 8 * (4 * 256 + 1)  # bounded, whatever p
        assert all_reduced.far == 4 * math.ceil(math.log2(p))
        assert gathered.sent > (p - 1) * 4 * (2 * 256 + 1)
        assert ours([256], p, all_reduce=ring_all_reduce).far == 4 * (p - 1)


@pytest.mark.parametrize("processes", range(2, 40))
def test_the_numbers_sent_are_never_more_than_of_a_gather_but_the_bytes_of_float64_are_below_6(
    processes: int,
) -> None:
    channels = sync_cost.resnet50_channels()
    bytes_ours, bytes_gathered = ours(channels, processes).sent, gathering(channels, processes).sent
    assert bytes_ours / 8 <= bytes_gathered / 4
    assert (bytes_ours > bytes_gathered) == (processes < 6)


def test_resnet50_has_53_batch_norms_and_26560_channels() -> None:
    channels = sync_cost.resnet50_channels()
    assert len(channels) == 53
    assert sum(channels) == 26_560  # half of its 53,120 weights and biases
    assert channels[:5] == [64, 64, 64, 256, 256]
    assert channels[-3:] == [512, 512, 2048]


def test_a_step_is_the_sum_of_its_layers() -> None:
    single = [ours([c], 5) for c in (3, 70)]
    assert ours([3, 70], 5) == pytest.approx([sum(pair) for pair in zip(*single, strict=True)])


def test_fit_finds_the_network_of_times_without_noise() -> None:
    network = Network("made up", 3e-5, 2e-5, 2e-5, 1e-9)
    costs = [f(p, size) for f in (ring_all_reduce, ring_all_gather) for p in (2, 3) for size in (8, 80_000)]
    assert sync_cost.fit("made up", [(cost, cost.seconds(network)) for cost in costs])[1:5] == pytest.approx(
        network[1:5]
    )


def test_fit_gives_no_negative_time() -> None:
    free = [(Cost(1, 0, 2, size), 1e-3 - 1e-9 * size) for size in (0, 1000, 100_000)]
    assert min(sync_cost.fit("", free)[1:5]) >= 0


def test_noise_is_that_of_normal_values() -> None:
    samples = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance = sync_cost.noise_of_statistics(64)
    assert samples.mean(1).std().item() == pytest.approx(mean, rel=0.05)
    assert samples.var(1).std().item() == pytest.approx(variance, rel=0.05)


@pytest.mark.usefixtures("group_of_one")
def test_the_layer_sends_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(numbers: torch.Tensor, *arguments: Any) -> Any:
        sent.append(numbers.nbytes)
        return all_reduce(numbers, *arguments)

    # A group of one would not communicate: nothing to wait for, so it is told that it has company.
    monkeypatch.setattr(dist, "all_reduce", counted)
    monkeypatch.setattr(distributed, "group_of", lambda sync: dist.group.WORLD)
    for channels in (1, 6, 64):
        sent.clear()
        x = torch.randn(4, channels, requires_grad=True)
        bn.BatchNorm1d(channels, sync=True)(x).square().sum().backward()
        # A ring of p processes sends 2 (p-1)/p of it; of 2 processes, exactly it.
        assert len(sent) == ours([channels], 2).calls == 2
        assert sum(sent) == ours([channels], 2).sent
