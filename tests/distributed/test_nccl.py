"""Tests of synchronised layers on GPUs that NCCL connects."""

from pathlib import Path

import pytest
import torch

from tests.distributed import nccl
from tests.distributed.children import run_ranks


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
def test_nccl(processes: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"{processes} GPUs are needed, there are {torch.cuda.device_count()}")
    ends = run_ranks("tests.distributed.nccl", processes, tmp_path, 120)
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(processes)]
    assert ends == [0] * processes, logs


def test_what_those_processes_compare_is_true_of_one_on_the_cpu(tmp_path: Path) -> None:
    nccl.compare("gloo", torch.device("cpu"), 0, 1, tmp_path)
