"""Lets small tensors reach the CPU kernels, and the formula that their tests compare them with."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import team
from batchnorm.kernels.reference import ACTIVATIONS


@pytest.fixture(autouse=True)
def _small_tensors_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "SMALLEST", 1)
    monkeypatch.setattr(team, "_WORTH_A_TEAM", 1)
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def formula():
    """Batch norm written out in torch's operations, with the batch's statistics or the given ones."""

    def compute(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None = None,
        *,
        eps: float,
        channel_dim: int,
        activation: str | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        dims = [dim for dim in range(x.ndim) if dim != channel_dim]
        shape = [1] * x.ndim
        shape[channel_dim] = -1
        if statistics is None:
            mean = x.mean(dims, keepdim=True)
            var = (x - mean).square().mean(dims, keepdim=True)
        else:
            mean, var = (values.reshape(shape) for values in statistics)
        y = (x - mean) / (var + eps).sqrt()
        if weight is not None:
            y = y * weight.reshape(shape)
        if bias is not None:
            y = y + bias.reshape(shape)
        if residual is not None:
            y = y + residual
        return y if activation is None else ACTIVATIONS[activation](y)

    return compute
