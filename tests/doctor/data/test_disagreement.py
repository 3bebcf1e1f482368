"""Two processes: what differs between them is found, and what chance alone makes differ is a note."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CASE = Path(__file__).parent / "processes_case.py"
SECONDS = 120


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each process found, by situation."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    children = []
    try:
        for rank in range(2):
            with open(folder / f"{rank}.log", "w") as log:
                command = [sys.executable, str(CASE), str(rank), str(folder)]
                children.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
                )
        deadline = time.monotonic() + SECONDS
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    results = [folder / f"{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in results), (folder / "0.log").read_text()[-2000:]
    return [json.loads(path.read_text()) for path in results]


@pytest.mark.parametrize(
    ("situation", "wanted"),
    [
        ("equal", []),
        ("own statistics", [("BN302", "1", "note"), ("BN302", "4", "note")]),
        ("far statistics", [("BN302", "1", "warning")]),
        ("other data", [("BN303", "1", "warning")]),
        ("other weights", [("BN301", "3", "error")]),
        ("after", [("BN301", "3", "error")]),
        ("other model", [("BN301", None, "error")]),
    ],
)
def test_what_differs_is_found_by_every_process(situation: str, wanted: list[Any], found: Any) -> None:
    for of_process in found:
        got = [(one["code"], one["layer"], one["severity"]) for one in of_process[situation]]
        if situation == "far statistics":
            got = got[:1]  # what comes after the layer is moved as well
        assert got == wanted


def test_a_process_that_is_alone_says_so_and_disturbs_no_other(found: Any) -> None:
    (finding,) = found[0]["alone"]
    assert (finding["code"], finding["severity"]) == ("BN301", "note")
    assert "not all of them called diagnose" in finding["what"]
