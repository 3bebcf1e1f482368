"""What two processes that diagnose each by itself find of each other, in a torch.distributed of theirs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.doctor.data import processes
from batchnorm.doctor.finding import Finding
from tests.distributed.doctor_cases import case
from tests.doctor.data.digits import examine


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(1)
    )


def data(seed: int, offset: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 1, 8, 8, generator=generator) + offset for _ in range(4)]


def trained(offset: float = 0.0) -> nn.Module:
    """Running statistics of each process's own batches."""
    network = model().train()
    with torch.no_grad():
        for x in data(dist.get_rank() + 10, offset) * 12:
            network(x)
    return network


def findings(network: nn.Module, offset: float = 0.0) -> list[Finding]:
    """What compares the processes, each of which has batches of its own."""
    found = examine((network, data(dist.get_rank(), offset), {}))
    assert "BN200" not in {finding.code for finding in found}
    return [finding for finding in found if finding.code.startswith("BN3")]


def assert_found(found: list[Finding], *wanted: tuple[str, str | None, str]) -> None:
    assert [(finding.code, finding.layer, finding.severity) for finding in found] == list(wanted)


def with_another_weight() -> nn.Module:
    other = model()
    with torch.no_grad():
        other[3].weight[0, 0, 0, 0] += 1e-3 * dist.get_rank()
    return other


@case(2)
def what_chance_makes_differ_is_a_note() -> None:
    assert_found(findings(model()))
    assert_found(findings(trained()), ("BN302", "1", "note"), ("BN302", "4", "note"))


@case(2)
def far_statistics_and_other_data_are_warnings() -> None:
    rank = dist.get_rank()
    # What comes after the layer is moved as well.
    assert_found(findings(trained(3.0 * rank))[:1], ("BN302", "1", "warning"))
    assert_found(findings(model(), 1.0 * rank), ("BN303", "1", "warning"))


@case(2)
def other_weights_and_another_structure_are_errors() -> None:
    assert_found(findings(with_another_weight()), ("BN301", "3", "error"))
    bias = dist.get_rank() == 0
    assert_found(findings(nn.Sequential(model(), nn.Linear(64, 1, bias=bias))), ("BN301", None, "error"))


@case(2)
def a_process_that_is_alone_says_so_and_disturbs_no_other() -> None:
    with seconds(2):
        if dist.get_rank() == 0:  # the other goes on to its next collective
            (finding,) = findings(model())
            assert (finding.code, finding.severity) == ("BN301", "note")
            assert "not all of them called diagnose" in finding.what
        dist.all_reduce(total := torch.ones(1))
        assert total == 2
    assert_found(findings(with_another_weight()), ("BN301", "3", "error"))


@contextmanager
def seconds(patience: int) -> Iterator[None]:
    before = processes._SECONDS
    processes._SECONDS = patience
    try:
        yield
    finally:
        processes._SECONDS = before
