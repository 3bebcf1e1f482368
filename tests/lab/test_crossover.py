"""Crossovers: from how many values on ours are as fast, by races that are made up and on the CPU."""

import pytest
import torch

from batchnorm.kernels.cuda import thresholds
from batchnorm.kernels.cuda.thresholds import KINDS, Kind
from batchnorm.lab.bench_cases import Shape
from batchnorm.lab.bench_probes import Contender
from batchnorm.lab.crossover import SIZES, WallClock, cases, crossovers, gpu_race, least_from, race


@pytest.mark.parametrize(
    ("ratios", "least"),
    [
        ({8: 1.5, 16: 1.02, 32: 0.5}, 16),
        ({8: 0.9, 16: 1.1, 32: 1.0}, 32),  # what wins below a loss does not count
        ({8: 0.9, 16: 0.9, 32: 1.03}, None),
        ({32: 0.8, 8: 0.9}, 8),
        ({8: 2.0, 16: float("nan")}, None),
    ],
)
def test_the_least_from_which_on_nothing_is_lost(ratios: dict[int, float], least: int | None) -> None:
    assert least_from(ratios) == least


def test_every_kind_is_raced_at_every_size_and_the_worst_counts() -> None:
    seen: dict[Kind, set[Shape]] = {}

    def made_up(kind: Kind, shape: Shape) -> float:
        seen.setdefault(kind, set()).add(shape)
        values = shape[0] * shape[1] * shape[2] * shape[3]
        slow = kind.training and shape[1] == 512  # channels that decide
        return 1.5 if values < (1 << 18 if slow else 1 << 16) or not kind.fused else 0.7

    steps: list[int] = []
    least, ratios = crossovers(made_up, on_steps=steps.append)
    assert set(least) == set(seen) == set(KINDS)
    assert len(steps) == len(KINDS) * len(SIZES)
    for kind in KINDS:
        expected = None if not kind.fused else 1 << 18 if kind.training else 1 << 16
        assert least[kind] == expected
        assert list(ratios[kind]) == list(SIZES)
        assert {shape[1] for shape in seen[kind]} == {64, 512}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_race_times_calls_of_its_kind(kind: Kind) -> None:
    calls = 0

    def clock(contender: Contender, _: int) -> float:
        nonlocal calls
        calls += 1
        y = contender.call()
        contender.forget()
        assert (y.grad_fn is not None) == kind.training
        assert y.dtype == (torch.bfloat16 if kind.half else torch.float32)
        assert y.is_contiguous(memory_format=torch.channels_last) == kind.rows
        assert (y.min() >= 0) == kind.fused
        return 1e-3

    assert race(kind, (2, 3, 4, 4), torch.device("cpu"), 1e-9, clock) == 1.0
    assert [case.residual for case in cases(kind)] == ([False, True] if kind.fused else [False])
    assert calls > 0


@pytest.mark.parametrize("forced", [True, False])
def test_our_kernels_are_forced_or_chosen(forced: bool) -> None:
    kind = KINDS[0]
    before = thresholds.LEAST_VALUES[kind]

    def clock(contender: Contender, _: int) -> float:
        assert thresholds.LEAST_VALUES[kind] == (1 if forced else before)
        return 1e-3

    race(kind, (2, 3, 4, 4), torch.device("cpu"), 1e-9, clock, forced)
    assert thresholds.LEAST_VALUES[kind] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    ratio = gpu_race(device, 0.05)(KINDS[0], (32, 64, 56, 56))
    assert 0.1 < ratio < 2
    x = torch.ones(1000, device=device)
    assert WallClock(device)(Contender(lambda: x + 1), 3) > 0
