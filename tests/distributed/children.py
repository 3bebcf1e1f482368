"""A set of processes, one for each rank, that ends with the function that starts it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(module: str, processes: int, folder: Path, seconds: float, *arguments: str) -> list[int]:
    """Exit status of each `python -m MODULE RANK PROCESSES FOLDER ...`; what it prints is in `RANK.log`.

    Those that are not done after so many seconds are killed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            with open(folder / f"{rank}.log", "w") as log:
                command = [sys.executable, "-m", module, str(rank), str(processes), str(folder), *arguments]
                # A session of its own, so that whatever a child may start ends with it.
                children.append(
                    subprocess.Popen(
                        command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
                    )
                )
        deadline = time.monotonic() + seconds
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return [child.returncode for child in children]
