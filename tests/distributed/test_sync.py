"""Tests of the layers' `sync` in a process that is alone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model import merge_running_statistics

C = 3


@pytest.mark.parametrize(
    "options", [{}, {"renorm": True}, {"momentum": None}, {"activation": "relu"}], ids=str
)
def test_without_torch_distributed_it_is_as_without(options: dict[str, Any]) -> None:
    ours, plain = bn.BatchNorm1d(C, sync=True, **options), bn.BatchNorm1d(C, **options)
    x, twin = (torch.randn(6, C, requires_grad=True) for _ in range(2))
    twin.data.copy_(x.data)
    y, wanted = ours(x), plain(twin)
    y.square().sum().backward()
    wanted.square().sum().backward()
    assert_close((y, x.grad), (wanted, twin.grad), rtol=0, atol=0)
    assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert_close(ours.eval()(x), plain.eval()(twin), rtol=0, atol=0)


def test_one_value_per_channel_is_still_an_error() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn.BatchNorm1d(C, sync=True)(torch.randn(1, C))


@pytest.mark.parametrize(
    "value", [None, 1, "gloo", object(), [0, 1]], ids=["None", "1", "gloo", "object", "list"]
)
def test_what_is_no_group_is_an_error_that_changes_nothing(value: Any) -> None:
    with pytest.raises(TypeError, match=r"sync=.* expected True .*process group"):
        bn.BatchNorm1d(C, sync=value)
    layer = bn.BatchNorm1d(C, sync=True)
    with pytest.raises(TypeError, match=r"sync="):
        layer.sync = value
    assert layer.sync is True


def test_copies_and_pickles_keep_it() -> None:
    layer = bn.BatchNorm1d(C, sync=True)
    assert copy.deepcopy(layer).sync is True
    assert pickle.loads(pickle.dumps(layer)).sync is True
    assert bn.LazyBatchNorm1d(sync=True).sync is True
    assert bn.BatchNorm1d(C).sync is False


def test_the_repr_and_nothing_in_the_state_dict_says_so() -> None:
    layer = bn.BatchNorm1d(C, sync=True, activation="relu")
    assert repr(layer).endswith("activation='relu', sync=True)")
    assert "sync" not in repr(bn.BatchNorm1d(C))
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(C).state_dict())


def test_a_layer_pickled_before_there_was_sync_has_none() -> None:
    layer = bn.BatchNorm1d(C)
    del layer.__dict__["_sync"]
    assert layer.sync is False
    layer(torch.randn(4, C))


def test_a_merge_in_a_process_that_is_alone_changes_nothing() -> None:
    model = nn.Sequential(bn.BatchNorm1d(C), nn.BatchNorm1d(C))
    model(torch.randn(4, C))
    before = copy.deepcopy(model.state_dict())
    assert merge_running_statistics(model) is model
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_merge_of_what_is_no_model_is_an_error() -> None:
    with pytest.raises(TypeError, match="expected a model"):
        merge_running_statistics([bn.BatchNorm1d(C)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected None .*process group, got 'gloo'"):
        merge_running_statistics(bn.BatchNorm1d(C), "gloo")
