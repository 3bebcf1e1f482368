"""What processes check together about diagnose: the report is that of one process with all the data."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from tests.distributed import cases
from tests.doctor.data import faults
from tests.doctor.data.digits import Case, Make, batches, trained

CASES: cases.Cases = {}
case = cases.registering(CASES)
LENET = "lab/torch/relu"
SICK: dict[str, Make] = {
    "BN201": faults.spoiled(LENET, faults.statistics("fc.1", factor=0.01)),
    "BN202": faults.spoiled("vgg", faults.statistics("features.5", mean=1.0)),
    "BN203": faults.small_batches(LENET, 2),
    "BN204": faults.spoiled(LENET, faults.half_zero("conv.0")),
    "BN205": faults.spoiled("vgg", faults.dead("features.1")),
    "BN206": faults.with_data(LENET, faults.images_changed(lambda x: x * 1e-4)),
    "BN207": faults.spoiled(LENET, faults.far_bias("conv.0")),
    "BN208": faults.padded,
    "BN209": faults.with_data("vgg", faults.with_an_inf),
    "BN210": faults.spoiled(LENET, lambda m: None, forward=faults.evaluates_in_training_mode),
    "BN211": faults.checkpointed("vgg", False),
    "BN212": faults.spoiled("vgg", lambda m: None, forward=faults.two_forwards),
    "BN213": faults.handwritten,
    "BN214": faults.replaced("vgg", "features.2", lambda _: faults.Collects()),
    "BN215": faults.with_data(LENET, faults.images_changed(lambda x: 1 - x), mode=False),
    "BN216": faults.replaced("vgg", "features.2", lambda _: faults.CentresTheBatch()),
    "BN217": faults.with_data(LENET, faults.ordered),
}
# What is merged in ways of its own: calls, batches' sizes, the first batch of all, pairs of calls, samples.
IN_THREE = {"BN202", "BN203", "BN208", "BN209", "BN212", "BN214", "BN216", "BN217"}


def dealt(data: list[Any], sizes: list[int] | None = None) -> list[Any]:
    """This rank's batches: every k-th, of which a rank has no more than its size."""
    return next(own for rank, own in enumerate(shards(data, sizes)) if rank == dist.get_rank())


def shards(data: list[Any], sizes: list[int] | None = None) -> Iterator[list[Any]]:
    k = dist.get_world_size()
    for rank in range(k):
        yield data[rank::k][: None if sizes is None else sizes[rank]]


def together(data: list[Any], sizes: list[int]) -> list[Any]:
    """The batches of all ranks as one process has them: the first of each, then the second of each."""
    of_ranks = list(shards(data, sizes))
    return [own[n] for n in range(max(sizes)) for own in of_ranks if n < len(own)]


def assert_same(report: bn.Report, one: bn.Report) -> None:
    """The findings of one process, to rounding."""

    def places(of: bn.Report) -> list[Any]:
        found = [f for f in of.findings if not f.code.startswith("BN3")]
        return [(f.code, f.layer, f.severity) for f in found]

    assert places(report) == places(one)
    assert report.batches == one.batches
    findings = [f for f in report.findings if not f.code.startswith("BN3")]
    for ours, theirs in zip(findings, one.findings, strict=True):
        for name, value in theirs.evidence.items():
            if isinstance(value, float) and not math.isnan(value):
                assert ours.evidence[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (ours, theirs, name)
            elif not isinstance(value, float):
                assert ours.evidence[name] == value, (ours, theirs, name)


def assert_same_on_all(report: bn.Report) -> None:
    """To the letter."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, report.to_json())
    assert all(theirs == everyone[0] for theirs in everyone)


def diagnosed(model: nn.Module, data: list[Any], **options: Any) -> bn.Report:
    """In all processes, and the model is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = bn.diagnose(model, data, group=dist.group.WORLD, **options)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
    return report


def alone(model: nn.Module, data: list[Any], **options: Any) -> bn.Report:
    return bn.diagnose(copy.deepcopy(model), data, group=cases.ALONE, **options)


def check_sick(code: str, make: Callable[[], Case]) -> Callable[[], None]:
    def check() -> None:
        model, data, options = make()
        wanted = bn.diagnose(model, data, max_batches=8, group=cases.ALONE, **options)
        report = diagnosed(model, dealt(data[:8]), **options)
        assert code in {finding.code for finding in wanted.findings}
        assert_same(report, wanted)
        assert_same_on_all(report)

    check.__name__ = f"sick_{code}"
    return check


for _code, _make in SICK.items():
    case(*(2, 3) if _code in IN_THREE else (2,))(check_sick(_code, _make))


def found(report: bn.Report, code: str) -> bn.Finding:
    return next(finding for finding in report.findings if finding.code == code)


def grave(report: bn.Report) -> list[tuple[str, str | None]]:
    return [(f.code, f.layer) for f in report.findings if f.severity != "note"]


@case(2, 3)
def healthy_models_stay_healthy() -> None:
    for name in (LENET, "vgg"):
        model, shape, classes = trained(name)
        data = batches(shape, 32, 8, classes=classes)
        report = diagnosed(model, dealt(data))
        assert_same(report, alone(model, data))
        # Without weight decay and the like, which are static findings.
        assert not [code for code, _ in grave(report) if code.startswith("BN2") or code.startswith("BN3")]


@case(2, 3)
def uneven_and_missing_batches() -> None:
    """Of one rank none, or of another size."""
    model, data, _ = SICK["BN202"]()
    data[3] = tuple(tensor[:7] for tensor in data[3])
    for sizes in ([3, 1, 2], [0, 2, 2], [2, 0, 0]):
        sizes = sizes[: dist.get_world_size()]
        own = dealt(data, sizes)
        report = diagnosed(model, own)
        assert_same(report, alone(model, together(data, sizes)))
        assert_same_on_all(report)


@case(2, 3)
def no_batches_anywhere() -> None:
    model, _, _ = trained(LENET)
    with pytest.raises(ValueError, match="diagnose: the loader is empty on every rank"):
        diagnosed(model, [])
    report = bn.diagnose(model, group=dist.group.WORLD)
    assert report.to_dict() == alone(model, None).to_dict()
    # A loader is not given in some: they have no batches.
    data = batches((1, 28, 28), 16, 4, classes=10)
    report = bn.diagnose(model, None if dist.get_rank() else data, group=dist.group.WORLD)
    assert_same(report, alone(model, data))


@case(2, 3)
def fixes_are_those_of_all_processes() -> None:
    model, data, _ = SICK["BN202"]()
    model.features[1].momentum = 0.9
    wanted = copy.deepcopy(model)
    sizes = [4, 0, 3][: dist.get_world_size()]
    report = diagnosed(model, dealt(data, sizes))
    one = bn.diagnose(wanted, together(data, sizes), group=cases.ALONE)
    for code in ("BN106", "BN202"):
        fixed, of_one = report.fix(code), one.fix(code)
        assert not fixed.left
        report, one = fixed.after, of_one.after
        assert_same(report, one)
    assert_same_on_all(report)
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)
    assert model.features[1].momentum == 0.1
    with pytest.raises(ValueError, match="fix: there is no finding BN202"):
        report.fix("BN202")


@case(2, 3)
def a_synchronised_layer_has_the_values_of_all() -> None:
    model, data, _ = SICK["BN203"]()
    k = dist.get_world_size()

    def of(model: nn.Module) -> bn.Finding:
        findings = diagnosed(model, dealt(data)).findings
        return next(finding for finding in findings if (finding.code, finding.layer) == ("BN203", "fc.4"))

    apart, whole = of(model), of(bn.convert(copy.deepcopy(model), sync=True))
    assert (apart.severity, whole.severity) == ("error", "warning")
    assert whole.evidence["values"] == k * apart.evidence["values"]
    assert f"in {k} processes" in whole.what
    assert of(bn.convert(copy.deepcopy(model), sync=cases.ALONE)).what == apart.what


@case(2, 3)
def a_wrapped_model_is_trained_without_communication() -> None:
    """Backward passes would wait for other processes in DDP's hooks: here a rank has no batch."""
    model, data, _ = faults.checkpointed("vgg", False)()
    ddp = DistributedDataParallel(model)
    ddp(data[0][0]).sum()  # DDP now waits for gradients
    wanted = alone(model, data[:2])
    sizes = [2, 0, 0][: dist.get_world_size()]
    report = bn.diagnose(ddp, [data[:2], [], []][dist.get_rank()], group=dist.group.WORLD)
    assert ("BN211", "body.features.1") in grave(report)
    assert sum(sizes) == report.batches
    assert_same(report, wanted)
