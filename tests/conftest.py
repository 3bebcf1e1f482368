"""Shared by all tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The tensors are small: two threads would wait for each other, and on a busy machine for much longer.
    torch.set_num_threads(1)
