"""Fixtures of the kernels' tests."""

import pytest
import torch

from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import team
from batchnorm.kernels.cuda import plan as planning


@pytest.fixture
def small_inputs_too(monkeypatch):
    """The CPU kernels are chosen for inputs of any size."""
    monkeypatch.setattr(cpu, "pays", lambda *call: True)
    torch.manual_seed(0)


@pytest.fixture
def threads(monkeypatch):
    """A function that sets how many threads even small inputs are computed by."""
    before = torch.get_num_threads()
    monkeypatch.setattr(team, "_WORTH_A_TEAM", 1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cut(monkeypatch):
    """Sets sizes of `plan.py`: by default several small tiles per channel, in two parts and more."""

    def set_sizes(tile=32, row_channels=4, whole=0, programs=10):
        monkeypatch.setattr(planning, "TILE", tile)
        monkeypatch.setattr(planning, "ROW_CHANNELS", row_channels)
        monkeypatch.setattr(planning, "WHOLE_FORWARD", whole)
        monkeypatch.setattr(planning, "WHOLE_BACKWARD", whole)
        monkeypatch.setattr(planning, "PROGRAMS_PER_MULTIPROCESSOR", programs)
        planning.plan.cache_clear()

    set_sizes()
    torch.manual_seed(0)
    yield set_sizes
    planning.plan.cache_clear()
