"""Processes that talk over gloo on this machine: they start and end together, each leaves what it found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def found_by_ranks(script: str, processes: int, seconds: float, **environment: str) -> list[Any]:
    """What each `python SCRIPT RANK PROCESSES FOLDER` leaves; none outlives this call, whatever happens."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(processes):
                command = [sys.executable, script, str(rank), str(processes), folder]
                children.append(subprocess.Popen(command, env=environment, start_new_session=True))
            deadline = time.monotonic() + seconds
            for child in children:
                if child.wait(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"one of {processes} processes failed: its error is above")
        finally:
            for child in children:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]


@contextmanager
def one_of_them(arguments: list[str], seconds: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """In one of the processes, by its arguments: how many there are, and a dictionary for what it finds."""
    rank, processes, folder = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=seconds)
    )
    found: dict[str, Any] = {}
    yield processes, found
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
