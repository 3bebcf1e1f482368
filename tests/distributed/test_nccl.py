"""Tests of synchronised layers on GPUs that NCCL connects."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import nccl

ROOT = Path(__file__).parents[2]


def processes_on_gpus(processes: int, folder: Path) -> list[str]:
    """What each process has printed, and "" where it ended well; none is left behind."""
    children = []
    logs = [folder / f"{rank}.log" for rank in range(processes)]
    try:
        for rank, path in enumerate(logs):
            command = [sys.executable, "-m", "tests.distributed.nccl", str(rank), str(processes), str(folder)]
            with open(path, "w") as log:
                children.append(
                    subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
                )
        ends = [child.wait(timeout=120) for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return [path.read_text() if end else "" for path, end in zip(logs, ends, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
def test_nccl(processes: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"{processes} GPUs are needed, there are {torch.cuda.device_count()}")
    assert processes_on_gpus(processes, tmp_path) == [""] * processes


def test_what_those_processes_compare_is_true_of_one_on_the_cpu(tmp_path: Path) -> None:
    nccl.compare("gloo", torch.device("cpu"), 0, 1, tmp_path)
