"""Tests of recalibrate on any cut of the data, on functional batch norm, with a filter, and of its report."""

import copy
import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model import recalibration_report as report_of
from batchnorm.model.recalibration_report import _reports

C = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, C), nn.BatchNorm1d(C)
    ).double()


def by_definition(model: nn.Sequential, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of each batch norm's inputs, batches of one normalised by all so far."""
    xs, found = batches, []
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            seen, ys = torch.empty(0, C).double(), []
            for x in xs:
                seen = torch.cat([seen, x])
                by = x if len(x) > 1 else seen
                if len(by) > 1:
                    ys.append(F.batch_norm(x, by.mean(0), by.var(0, correction=0), layer.weight, layer.bias))
                else:
                    ys.append(layer.eval()(x))
            found.append((seen.mean(0), seen.var(0)))
            xs = ys
        else:
            xs = [layer(x) for x in xs]
    return found


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=12).filter(lambda sizes: sum(sizes) > 1))
def test_batches_of_one_are_normalised_by_all_so_far(sizes: list[int]) -> None:
    torch.manual_seed(0)
    model, batches = mlp().eval(), [2 * torch.randn(size, C).double() + 1 for size in sizes]
    with torch.no_grad():
        wanted = by_definition(copy.deepcopy(model), batches)
    bn.recalibrate(model, batches)
    for layer, (mean, var) in zip((model[1], model[4]), wanted, strict=True):
        assert_close(layer.running_mean, mean)
        assert_close(layer.running_var, var)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_thousand_and_three_rows_in_batches_of_two(sequential: bool) -> None:
    model, x = mlp(), torch.randn(1003, C).double()
    bn.recalibrate(model, torch.utils.data.DataLoader(x, batch_size=2), sequential=sequential)  # type: ignore[arg-type]
    with torch.no_grad():
        given_first = model[0](x)
    assert_close(model[1].running_mean, given_first.mean(0))
    assert_close(model[1].running_var, given_first.var(0))
    assert model[1].num_batches_tracked == 502


@pytest.mark.parametrize("sequential", [False, True])
def test_batches_of_one_after_statistics_that_were_nan(sequential: bool) -> None:
    model, x = mlp(), torch.randn(50, C).double()
    for layer in (model[1], model[4]):
        layer.running_mean.fill_(torch.nan)
        layer.running_var.fill_(torch.inf)
    bn.recalibrate(model, list(x.split(1)), sequential=sequential)
    with torch.no_grad():
        assert_close(model[1].running_mean, model[0](x).mean(0))
    assert all(bool(buffer.isfinite().all()) for buffer in model.buffers())


def test_a_mask_that_leaves_some_channels_one_value() -> None:
    layer, x = bn.BatchNorm1d(2).double(), torch.randn(6, 2).double()
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[4:, 0], mask[5, 0] = False, True
    batches = [(x[:4], mask[:4]), (x[4:], mask[4:])]
    bn.recalibrate(layer, batches, forward=lambda model, batch: model(batch[0], mask=batch[1]))
    kept = x[mask[:, 0], 0]
    assert_close(layer.running_mean, torch.stack([kept.mean(), x[:, 1].mean()]))
    assert_close(layer.running_var, torch.stack([kept.var(), x[:, 1].var()]))


# Batch norm that is called as a function.


class Functional(nn.Module):
    def __init__(self, training: bool | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))
        self.register_buffer("table", torch.ones(7))
        self.gain = nn.Parameter(torch.rand(C) + 0.5)
        self.force = training

    def forward(self, x: Tensor) -> Tensor:
        training = self.training if self.force is None else self.force
        y = F.batch_norm(self.conv(x), self.mean, self.var, self.gain, training=training)
        return self.norm(y.relu())


def wanted_of(model: Functional, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        y = model.conv(x)
    return y.mean((0, 2, 3)), y.var((0, 2, 3))


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("force", [None, True, False])
def test_functions_are_recalibrated(force: bool | None, sequential: bool) -> None:
    model, x = Functional(force).double(), torch.randn(12, 3, 6, 6).double() * 3 + 1
    bn.recalibrate(model, list(x.split(5)), sequential=sequential)
    mean, var = wanted_of(model, x)
    assert_close(model.mean, mean)
    assert_close(model.var, var)
    assert torch.equal(model.table, torch.ones(7).double())
    if sequential:
        with torch.no_grad():
            y = F.batch_norm(model.conv(x), mean, var, model.gain).relu()
        if force is not True:  # which normalises by the batch whatever the mode is
            assert_close(model.norm.running_mean, y.mean((0, 2, 3)))
            assert_close(model.norm.running_var, y.var((0, 2, 3)))


def test_a_model_that_has_functions_alone() -> None:
    model = Functional().double()
    model.norm = nn.Identity()
    x = torch.randn(12, 3, 6, 6).double()
    bn.recalibrate(model, [x])
    assert_close(model.mean, wanted_of(model, x)[0])
    assert [change.layer for change in report_of(model).changed] == ["batch_norm() with mean and var"]


def test_buffers_that_no_function_is_given_are_no_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_buffer("mean", torch.zeros(3))
    model.register_buffer("std", torch.ones(3))
    with pytest.raises(ValueError, match="recalibrate: no batch norm in Sequential"):
        bn.recalibrate(model, [torch.randn(4, 3)])


def test_a_failure_leaves_functions_as_they_were() -> None:
    model = Functional().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        bn.recalibrate(model, [torch.randn(4, 3, 6, 6).double(), torch.randn(4, 2, 6, 6).double()])
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_adapt_mixes_those_of_functions_too() -> None:
    model, x = Functional().double(), torch.randn(12, 3, 6, 6).double()
    bn.adapt(model, [x], prior=12)
    assert_close(model.mean, wanted_of(model, x)[0] / 2)


# The filter and the report.


def test_a_filter_says_which_are_meant() -> None:
    model, x = mlp(), torch.randn(40, C).double()
    asked = []

    def filter(name: str, layer: nn.Module) -> bool:
        asked.append((name, type(layer)))
        return name == "4"

    bn.recalibrate(model, [x], filter=filter)
    assert {("1", nn.BatchNorm1d), ("4", nn.BatchNorm1d)} <= set(asked)
    assert torch.equal(model[1].running_mean, torch.zeros(C).double())
    with torch.no_grad():
        assert_close(model[4].running_mean, model[:4].eval()(x).mean(0))
    report = report_of(model)
    assert [change.layer for change in report.changed] == ["BatchNorm1d '4'"]
    assert [str(entry) for entry in report.left] == ["BatchNorm1d '1': the filter leaves it"]


def test_a_filter_leaves_functions_too() -> None:
    model, x = Functional().double(), torch.randn(12, 3, 6, 6).double()
    bn.recalibrate(model, [x], filter=lambda name, layer: isinstance(layer, nn.BatchNorm2d))
    assert torch.equal(model.mean, torch.zeros(C).double())


@pytest.mark.parametrize("sequential", [False, True])
def test_the_report_says_how_far_the_statistics_were(sequential: bool) -> None:
    model, x = mlp(), torch.randn(40, C).double()
    bn.recalibrate(model, [x], sequential=sequential)
    assert all(change.mean_shift > 0.01 for change in report_of(model).changed)
    model[1].running_mean += 0.5 * (model[1].running_var + model[1].eps).sqrt()
    model[1].running_var.mul_(4)
    bn.recalibrate(model, [x], sequential=sequential)
    first, second = report_of(model).changed
    assert (first.layer, first.batches, first.values) == ("BatchNorm1d '1'", 1, 40)
    assert first.mean_shift == pytest.approx(0.5, rel=1e-6)
    assert first.variance_factor == pytest.approx(4, rel=1e-3)
    assert second.mean_shift == pytest.approx(0, abs=1e-9)
    assert "BatchNorm1d '1': mean by 0.5 std, variance by a factor 4" in str(report_of(model))


def test_the_report_of_what_was_left() -> None:
    model = nn.ModuleDict(
        {"used": nn.BatchNorm1d(C), "frozen": nn.BatchNorm1d(C), "unused": nn.BatchNorm1d(C),
         "none": nn.BatchNorm1d(C, track_running_stats=False)}
    )  # fmt: skip
    bn.freeze(model["frozen"])
    x = torch.randn(9, C)
    with pytest.warns(UserWarning, match="no data reached BatchNorm1d 'unused'"):
        bn.recalibrate(model, [x], forward=lambda m, x: m["none"](m["frozen"](m["used"](x))))
    assert {str(entry) for entry in report_of(model).left} == {
        "BatchNorm1d 'frozen': it is frozen (bn.freeze)",
        "BatchNorm1d 'unused': no data reached it",
        "BatchNorm1d 'none': it has no running statistics",
    }


def test_there_is_no_report_without_a_call_nor_of_a_copy() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"has not been recalibrated in this process: bn\.recalibrate"):
        report_of(model)
    bn.recalibrate(model, [torch.randn(9, C).double()])
    with pytest.raises(ValueError, match="has not been recalibrated"):
        report_of(copy.deepcopy(model))
    with pytest.raises(TypeError, match="recalibration_report: expected a model"):
        report_of(3)  # type: ignore[arg-type]
    kept = len(_reports)
    del model
    gc.collect()
    assert len(_reports) < kept


# The filter of the other verbs.

VERBS: dict[str, Any] = {
    "convert": bn.convert,
    "revert": bn.revert,
    "freeze": bn.freeze,
    "unfreeze": bn.unfreeze,
    "reset": bn.reset,
    "hold": lambda model, filter: bn.hold(model, filter=filter).__enter__(),
    "recalibrate": lambda model, filter: bn.recalibrate(model, [torch.randn(9, C)], filter=filter),
    "adapt": lambda model, filter: bn.adapt(model, [torch.randn(9, C)], filter=filter),
    "fold": lambda model, filter: bn.fold(model, torch.randn(9, C), filter=filter),
    "absorb_bias": lambda model, filter: bn.absorb_bias(model, torch.randn(9, C), filter=filter),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_filter_that_names_nothing_changes_nothing(verb: str) -> None:
    model = mlp().float()
    before = [dict(vars(module)) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{verb}: .*filter is true for none of the 2 batch norms"):
        VERBS[verb](model, filter=lambda name, layer: False)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("verb", VERBS)
def test_a_filter_that_is_no_function(verb: str) -> None:
    with pytest.raises(TypeError, match=rf"{verb}: expected filter to be a function"):
        VERBS[verb](mlp().float(), filter="1")


def test_a_filter_of_each_verb() -> None:
    def last(name: str, layer: nn.Module) -> bool:
        return name == "4"

    model = bn.freeze(mlp().float(), filter=last)
    model.train()
    assert (model[1].training, model[4].training) == (True, False)
    bn.freeze(model)
    bn.unfreeze(model, filter=last)
    assert (model[1].training, model[4].training) == (False, True)
    bn.unfreeze(model)
    with bn.hold(model, filter=last):
        model(torch.randn(9, C))
    assert (int(model[1].num_batches_tracked), int(model[4].num_batches_tracked)) == (1, 0)
    bn.convert(model, filter=last)
    assert (type(model[1]), isinstance(model[4], bn.BatchNorm1d)) == (nn.BatchNorm1d, True)
    bn.convert(model)
    bn.revert(model, filter=last)
    assert (isinstance(model[1], bn.BatchNorm1d), type(model[4])) == (True, nn.BatchNorm1d)
    model(torch.randn(9, C))
    bn.reset(model, filter=last)
    assert (int(model[1].num_batches_tracked), int(model[4].num_batches_tracked)) == (2, 0)
    folded = bn.fold(model, torch.randn(9, C), filter=last)
    assert [type(folded[i]) for i in (1, 4)] == [nn.BatchNorm1d, nn.Identity]
    assert "the filter leaves it" in str(folded.fold_report)
    bn.absorb_bias(model, torch.randn(9, C), filter=last)
    assert bool((model[0].bias != 0).any())
    assert bool((model[3].bias == 0).all())
