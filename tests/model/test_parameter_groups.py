"""Tests of parameter_groups."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model import freeze, parameter_groups

C = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def names(model: nn.Module, group: dict[str, Any]) -> list[str]:
    called = {id(parameter): name for name, parameter in model.named_parameters()}
    return [called[id(parameter)] for parameter in group["params"]]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(C, C, 1), bn.BatchNorm1d(C), nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, C))
    )


def test_batch_norms_and_biases_do_not_decay() -> None:
    model = net()
    decayed, left_alone = parameter_groups(model, 0.1)
    assert names(model, decayed) == ["0.weight", "2.1.weight"]
    assert names(model, left_alone) == ["0.bias", "1.weight", "1.bias", "2.0.weight", "2.0.bias", "2.1.bias"]
    assert (decayed["weight_decay"], left_alone["weight_decay"]) == (0.1, 0.0)


def test_biases_may_decay_but_not_those_of_batch_norms() -> None:
    model = net()
    decayed, left_alone = parameter_groups(model, 0.1, decay_bias=True)
    assert names(model, decayed) == ["0.weight", "0.bias", "2.1.weight", "2.1.bias"]
    assert names(model, left_alone) == ["1.weight", "1.bias", "2.0.weight", "2.0.bias"]


def test_it_is_the_type_that_counts() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn_like = nn.Parameter(torch.ones(C))
            self.norm = nn.Linear(C, C, bias=False)
            self.plain = type("Sub", (bn.BatchNorm1d,), {})(C)

    model = Own()
    decayed, left_alone = parameter_groups(model, 0.1)
    assert names(model, decayed) == ["bn_like", "norm.weight"]
    assert names(model, left_alone) == ["plain.weight", "plain.bias"]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(C),
        nn.SyncBatchNorm(C),
        bn.BatchNorm3d(C),
        nn.LazyBatchNorm1d(),
        bn.LazyBatchNorm1d(),
        nn.LayerNorm(C),
        nn.GroupNorm(2, C),
        nn.RMSNorm(C),
        nn.InstanceNorm1d(C, affine=True),
        nn.utils.parametrizations.weight_norm(bn.BatchNorm1d(C), dim=None),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_every_kind_of_norm(norm: nn.Module) -> None:
    decayed, left_alone = parameter_groups(nn.Sequential(norm, nn.Linear(C, C)), 0.1, decay_bias=True)
    assert len(decayed["params"]) == 2
    assert {id(parameter) for parameter in left_alone["params"]} == {id(p) for p in norm.parameters()}


def test_biases_of_other_layers() -> None:
    model = nn.Sequential(nn.LSTM(C, C), nn.MultiheadAttention(C, 2))
    decayed, left_alone = parameter_groups(model, 0.1)
    assert all("weight" in name for name in names(model, decayed))
    assert all("bias" in name for name in names(model, left_alone))
    assert len(names(model, left_alone)) == 4


def test_shared_parameters_are_there_once_and_those_of_a_batch_norm_are_left_alone() -> None:
    model = net()
    model.append(model[1])
    model.append(nn.Linear(C, C, bias=False))
    model[-1].weight = model[2][1].weight
    model.register_parameter("tied", model[2][0].weight)
    groups = parameter_groups(model, 0.1)
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}
    assert len(parameters) == len(list(model.parameters()))
    assert any(parameter is model.tied for parameter in groups[1]["params"])


def test_frozen_ones_are_kept_and_an_optimizer_passes_over_them() -> None:
    model = freeze(net(), affine=True)
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(groups, lr=0.1)
    before = copy.deepcopy(model)
    model(torch.randn(8, C, C)).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, before[1].weight)
    assert not torch.equal(model[0].weight, before[0].weight)


def test_decay_shrinks_only_what_decays() -> None:
    model = net()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrinks = name in ("0.weight", "2.1.weight")
        assert_close(parameter.detach(), before[name] * (0.95 if shrinks else 1))


def test_a_model_without_batch_norm_and_one_of_nothing_else() -> None:
    assert [len(group["params"]) for group in parameter_groups(nn.Linear(C, C), 0)] == [1, 1]
    groups = parameter_groups(bn.BatchNorm1d(C), 0.1)
    assert [len(group["params"]) for group in groups] == [0, 2]
    torch.optim.Adam(groups).step()


@pytest.mark.parametrize(
    ("model", "weight_decay", "error", "message"),
    [
        (nn.Linear(C, C), -1e-4, ValueError, r"weight_decay=-0\.0001 must be 0 or more"),
        (nn.Linear(C, C), float("nan"), ValueError, "weight_decay=nan"),
        (nn.Linear(C, C), float("inf"), ValueError, "finite"),
        (nn.Linear(C, C), "1e-4", TypeError, "expected a number"),
        (nn.ReLU(), 1e-4, ValueError, "ReLU has no parameters"),
        (nn.Linear(C, C).parameters(), 1e-4, TypeError, "expected a model"),
    ],
)
def test_bad_input(model: Any, weight_decay: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"parameter_groups: .*{message}"):
        parameter_groups(model, weight_decay)
