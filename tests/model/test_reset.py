"""Tests of reset."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model import freeze, reset

C = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_reset(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(C), nn.Linear(C, C), kind(C), kind(C, track_running_stats=False))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model(torch.randn(8, C))
    freeze(model[2])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = [id(buffer) for buffer in model.buffers()]
    assert reset(model) is model
    assert [id(buffer) for buffer in model.buffers()] == buffers
    fresh: dict[str, Tensor] = {
        "0.running_mean": torch.zeros(C),
        "0.running_var": torch.ones(C),
        "0.num_batches_tracked": torch.tensor(0),
    }
    assert_close(dict(model.state_dict()), before | fresh, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(C, C), "no batch norm in Linear"),
        (nn.BatchNorm1d(C, track_running_stats=False), "nothing to reset"),
        (freeze(bn.BatchNorm1d(C)), "is frozen"),
        (nn.Sequential(bn.BatchNorm1d(C), nn.LazyBatchNorm1d()), "LazyBatchNorm1d '1'"),
    ],
    ids=range(4),
)
def test_reset_of_nothing(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"reset: .*{message}"):
        reset(model)
