"""What processes check together about diagnose where they have not the same, or one of them fails."""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm as bn
from tests.distributed import cases, disagreement_cases
from tests.distributed.doctor_cases import (
    CASES,
    LENET,
    SICK,
    alone,
    assert_same,
    assert_same_on_all,
    case,
    dealt,
    diagnosed,
    found,
    grave,
    together,
)
from tests.doctor.data import faults
from tests.doctor.data.digits import batches, trained

# With the cases that the other module registers.
__all__ = ["CASES", "disagreement_cases"]


class RaisesOn(nn.Module):
    """Raises for the second batch of a rank."""

    def __init__(self, rank: int, training: bool) -> None:
        super().__init__()
        self.rank, self.in_training = rank, training
        self.times = 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        if dist.get_rank() == self.rank and self.training == self.in_training and self.times > 1:
            raise IndexError("index 7 is out of range")
        return x


@case(2, 3)
def a_forward_that_raises_is_a_finding_everywhere() -> None:
    last = dist.get_world_size() - 1
    for in_training, what in ((False, "the forward"), (True, "a training step")):
        model, data, _ = SICK["BN202"]()
        model.features[2] = RaisesOn(last, in_training)
        report = diagnosed(model, dealt(data))
        (finding,) = [f for f in report.findings if f.code == "BN200"]
        assert finding.layer == "features.2"
        place = "batch 1 of rank 1" if in_training else f"batch 2 of rank {last}"
        assert finding.what.startswith(f"{what} raises IndexError in RaisesOn 'features.2' on {place}: index")
        assert finding.what.endswith(f"(on rank {last} alone)") == in_training
        assert ("BN202", "features.5") in grave(report)  # what the others saw
        assert_same_on_all(report)


@case(2, 3)
def what_is_wrong_in_one_process_fails_in_all() -> None:
    def broken() -> Iterator[Any]:
        yield from data[:1]
        raise OSError("disk")

    def evaluate() -> None:
        if dist.get_rank() == 1:
            raise KeyError("no such file")
        model(data[0][0])

    data = batches((1, 28, 28), 16, 4, classes=10)
    model, _, _ = trained(LENET)
    mine, elsewhere = (OSError, "disk"), (RuntimeError, "diagnose: failed on rank 1: ")
    error, message = mine if dist.get_rank() == 1 else elsewhere
    with pytest.raises(error, match=message):
        diagnosed(model, broken() if dist.get_rank() == 1 else data)
    error, message = (TypeError, "expected a model") if dist.get_rank() == 1 else elsewhere
    with pytest.raises(error, match=message):
        bn.diagnose(3 if dist.get_rank() == 1 else model, data, group=dist.group.WORLD)
    mine = (KeyError, "no such file")
    error, message = mine if dist.get_rank() == 1 else elsewhere
    with pytest.raises(error, match=message):
        diagnosed(model, data, evaluate=evaluate)
    assert diagnosed(model, dealt(data)).batches == 4


@case(2, 3)
def processes_that_disagree_are_named() -> None:
    k, last = dist.get_world_size(), dist.get_world_size() - 1
    others = "rank 0" if k == 2 else "ranks 0 and 1"
    data = dealt(batches((1, 28, 28), 32, 6, classes=10))
    model, _, _ = trained(LENET)
    # Parameters
    one = copy.deepcopy(model)
    with torch.no_grad():
        one.fc[0].weight[0, 0] += dist.get_rank() // last
    report = diagnosed(one, data)
    finding = found(report, "BN301")
    assert finding.layer == "fc.0"
    assert finding.what.endswith(f"from 'fc.0.weight' on: rank {last} from {others}")
    assert_same_on_all(report)
    # Buffers: an average that one of them has lost is a fault of its own.
    one = copy.deepcopy(model)
    if dist.get_rank() == last:
        faults.forgotten(one)
    report = diagnosed(one, data)
    assert found(report, "BN302").what.endswith(f": rank {last} from {others}")
    assert f"(on rank {last} alone)" in found(report, "BN202").what
    assert_same_on_all(report)
    # Settings
    one = copy.deepcopy(model)
    one.fc[1].momentum = 0.9 if dist.get_rank() == last else 0.1
    report = diagnosed(one, data)
    assert found(report, "BN106").what.endswith(f"(on rank {last} alone)")
    with pytest.raises(ValueError, match=f"fix: BN106 is found on rank {last} alone: give all processes the"):
        report.fix("BN106")
    assert one.fc[1].momentum == (0.9 if dist.get_rank() == last else 0.1)
    # Structure
    one = copy.deepcopy(model)
    if dist.get_rank() == last:
        one.fc[0], one.fc[1] = nn.Linear(one.fc[0].in_features, 50), nn.BatchNorm1d(50)
        one.fc[3] = nn.Linear(50, one.fc[3].out_features)
    report = diagnosed(one, data)
    assert f"different models, rank {last} from {others}: rank 0 has fc" in found(report, "BN301").what
    assert_same_on_all(report)


@case(2, 3)
def data_that_differ_name_the_furthest() -> None:
    last = dist.get_world_size() - 1
    data = dealt(batches((1, 28, 28), 32, 6, classes=10))
    model, _, _ = trained(LENET)
    shifted = [(x + 3.0 * (dist.get_rank() == last), y) for x, y in data]
    finding = found(diagnosed(model, shifted), "BN303")
    assert f"between {last + 1} processes" in finding.what
    if last == 2:
        assert "rank 2 is furthest" in finding.what


@case(3)
def a_sub_group_diagnoses_without_the_rest() -> None:
    model, data, _ = SICK["BN204"]()
    if dist.get_rank() < 2:
        report = bn.diagnose(model, data[dist.get_rank() : 6 : 2], group=cases.PAIR)
        assert_same(report, alone(model, data[:6]))
    else:
        with pytest.raises(ValueError, match="diagnose: this process is not in the group"):
            bn.diagnose(model, data, group=dist.GroupMember.NON_GROUP_MEMBER)
        with pytest.raises(ValueError, match="recalibrate: this process is not in the group"):
            bn.recalibrate(model, data, group=dist.GroupMember.NON_GROUP_MEMBER)
        with pytest.raises(TypeError, match=r"diagnose: expected None .* or a process group, got 'all'"):
            bn.diagnose(model, data, group="all")
    dist.barrier()


@case(2, 3)
def what_one_rank_alone_saw_names_it() -> None:
    """inf in a batch of the last, which is named; a module that collects in the last alone."""
    last = dist.get_world_size() - 1
    model, data, _ = SICK["BN202"]()
    own = dealt(data)
    if dist.get_rank() == last:
        own[1][0][0, 0, 0, 0] = float("inf")
    report = diagnosed(model, own)
    finding = found(report, "BN209")
    assert finding.what.endswith(f"in batch 2 of rank {last}")
    evidence = {"batch": last + 1 + dist.get_world_size(), "rank": last, "batch_of_rank": 2}
    assert evidence.items() <= finding.evidence.items()
    assert_same_on_all(report)
    model, data, _ = SICK["BN202"]()
    if dist.get_rank() == last:
        model.features[2] = faults.Collects()
    report = diagnosed(model, dealt(data))
    assert found(report, "BN214").what.endswith(f"more after every step (on rank {last} alone)")
    assert_same_on_all(report)


@dataclass
class Batch:
    """What cannot be sent to another process."""

    images: Tensor


@case(2, 3)
def batches_that_cannot_be_sent_stay_where_they_are() -> None:
    """Each rank then looks at its own, and one without any says what the others say."""

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.images)

    model, data, _ = SICK["BN214"]()
    objects = [Batch(x) for x, _ in data]
    for sizes in ([3, 3, 2], [3, 0, 1], [0, 2, 0]):
        sizes = sizes[: dist.get_world_size()]
        report = diagnosed(model, dealt(objects, sizes), forward=forward)
        wanted = alone(model, together(objects, sizes), forward=forward)
        assert "alone)" not in found(report, "BN214").what
        assert [(f.code, f.layer, f.severity) for f in report.findings] == [
            (f.code, f.layer, f.severity) for f in wanted.findings
        ]
        assert_same_on_all(report)


def biased() -> nn.Module:
    """Biases before batch norms, as BN101 finds them."""
    model, _, _ = trained(LENET)
    with torch.no_grad():
        for layer in (model.conv[0], model.fc[0]):
            layer.bias = nn.Parameter(torch.arange(1.0, len(layer.weight) + 1))
    return model


@case(2, 3)
def a_rank_without_batches_moves_its_biases_too() -> None:
    data = batches((1, 28, 28), 16, 4, classes=10)
    sizes = [2, 0, 1][: dist.get_world_size()]
    model = biased()
    before, one = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    report = diagnosed(model, dealt(data, sizes))
    of_one = bn.diagnose(one, together(data, sizes), group=cases.ALONE)
    assert not report.fix("BN101").left
    assert not of_one.fix("BN101").left
    assert model.conv[0].bias.abs().max() == 0
    torch.testing.assert_close(model.state_dict(), one.state_dict(), rtol=0, atol=0)
    # What cannot be sent cannot help there.
    model.load_state_dict(before)
    report = diagnosed(model, [Batch(x) for x, _ in dealt(data, sizes)], forward=lambda m, b: m(b.images))
    mine = (ValueError, "BN101 was not applied, the model is as it was: rank 1 has no batch, and cannot")
    elsewhere = (RuntimeError, "fix: failed on rank 1: ValueError: fix: BN101 was not applied")
    error, message = mine if dist.get_rank() == 1 else elsewhere
    with pytest.raises(error, match=message):
        report.fix("BN101")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@case(2)
def a_process_that_does_not_come_is_told_of_in_time() -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    model, data, _ = SICK["BN202"]()
    before = copy.deepcopy(model.state_dict())
    start = time.perf_counter()
    if dist.get_rank() == 0:
        with pytest.raises(
            RuntimeError, match="diagnose: the exchange between ranks 0 and 1 failed on rank 0"
        ):
            bn.diagnose(model, data[:2], group=group)
        assert time.perf_counter() - start < 10
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    dist.barrier()
