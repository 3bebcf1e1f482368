"""Commands under torchrun: said and written once, one that is lost or interrupted ends all of them."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.cli import run
from batchnorm.lab.nets import LeNet

SECONDS = 90  # for one command; on an idle machine each takes about 5
TRAIN = [
    "train",
    "--train-samples",
    "200",
    "--test-samples",
    "33",
    "--batch-size",
    "16",
    "--dtype",
    "float64",
]
LONG = [*TRAIN, "--epochs", "1000"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@contextmanager
def torchrun(*arguments: str, processes: int = 2) -> Iterator[subprocess.Popen[str]]:
    """The command in several processes, none of which is left at the end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*launcher, "--nproc-per-node", str(processes), "-m", "batchnorm", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield agent
    finally:
        if agent.poll() is None:
            for pid in [*children(agent.pid), agent.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            agent.wait(10)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def rank_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((v.removeprefix(b"RANK=").decode() for v in variables if v.startswith(b"RANK=")), "")


def said(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("batchnorm:")]


def metrics(folder: Path) -> list[dict[str, Any]]:
    found = folder / "metrics.jsonl"
    return [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []


def wait_for_an_epoch(folder: Path, agent: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not metrics(folder):
        assert agent.poll() is None, agent.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_train_prints_and_writes_once_and_resumes_in_one_process(tmp_path: Path) -> None:
    assert run([*TRAIN, "--epochs", "4", "--output", "whole"]) == 0
    with torchrun(*TRAIN, "--sync", "--epochs", "4", "--output", "run") as agent:
        wait_for_an_epoch(tmp_path / "run", agent)
        printed, errors = agent.communicate(timeout=SECONDS)
    assert agent.returncode == 0, errors
    assert [line.split(",")[0] for line in printed.splitlines()[1:-1]] == [f"epoch {n}" for n in (1, 2, 3, 4)]
    assert "2 processes with statistics synchronised" in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["processes"], summary["config"]["sync"]) == ("finished", 2, True)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert run(["train", "--resume", "--output", "run"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_others_which_say_so(tmp_path: Path) -> None:
    with torchrun(*LONG, "--output", "run") as agent:
        wait_for_an_epoch(tmp_path / "run", agent)
        (worker,) = [pid for pid in children(agent.pid) if rank_of(pid) == "1"]
        os.kill(worker, signal.SIGKILL)
        _, errors = agent.communicate(timeout=SECONDS)
    assert agent.returncode != 0
    (line,) = said(errors)
    assert "rank 0 of 2 lost another process in epoch" in line or "interrupted after" in line
    assert "go on" in line
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_in_any_number_of_processes(tmp_path: Path) -> None:
    with torchrun(*LONG, "--output", "run") as agent:
        wait_for_an_epoch(tmp_path / "run", agent)
        agent.send_signal(signal.SIGINT)
        _, errors = agent.communicate(timeout=SECONDS)
    (line,) = said(errors)
    assert "go on with: torchrun --nproc-per-node 2 -m batchnorm train --resume --output run" in line
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_recalibrate_is_that_of_one_process(tmp_path: Path) -> None:
    torch.save(LeNet().state_dict(), "start.pt")
    command = ["recalibrate", "batchnorm.lab.nets:LeNet", "--weights", "start.pt", "--data", "digits"]
    assert run([*command, "--output", "one.pt"]) == 0
    with torchrun(*command, "--output", "two.pt") as agent:
        printed, errors = agent.communicate(timeout=SECONDS)
    assert agent.returncode == 0, errors
    assert printed.count("recalibrated weights in two.pt") == 1
    one, two = (torch.load(name, weights_only=True) for name in ("one.pt", "two.pt"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=0, msg=name)


PATIENT = """
from torch import nn
from batchnorm.lab.nets import LeNet
def sick():
    model = LeNet("torch")
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).momentum = 0.9
    return model
"""


@pytest.mark.slow
def test_doctor_says_what_one_process_says_and_all_exit_alike(tmp_path: Path) -> None:
    (tmp_path / "torchrun_patients.py").write_text(PATIENT)
    torch.save(LeNet("torch").state_dict(), "weights.pt")
    command = [
        "doctor",
        "torchrun_patients:sick",
        "--weights",
        "weights.pt",
        "--data",
        "digits",
        "--max-batches",
        "5",
    ]
    command += ["--html", "page.html", "--json"]
    with redirect_stdout(io.StringIO()) as one:
        assert run(command) == 1
    (tmp_path / "page.html").unlink()
    with torchrun(*command) as agent:
        printed, errors = agent.communicate(timeout=SECONDS)
    assert agent.returncode == 1
    assert re.findall(r"exitcode +: (-?\d+)", errors) == ["1", "1"], errors
    assert (tmp_path / "page.html").exists()
    wanted, found = json.loads(one.getvalue()), json.loads(printed)
    assert found["batches"] == wanted["batches"] == 5
    keys = "code", "layer", "severity"
    assert [[f[key] for key in keys] for f in found["findings"]] == [
        [f[key] for key in keys] for f in wanted["findings"]
    ]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["compare"], "compare runs in one process"),
        (["doctor", "batchnorm.lab.nets:LeNet", "--fail-on", "panic"], "must be one of note, warning, error"),
        (["train", "--norm", "torch", "--sync"], "sync needs the norm batchnorm"),
    ],
)
def test_wrong_input_is_said_by_rank_0(
    command: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several = command[0] != "train"
    for rank in ("0", "1") if several else ("0",):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2" if several else "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
        assert run(command) == 2
        assert (message in capsys.readouterr().err) == (rank == "0")


def test_a_number_that_is_none_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "two")
    assert run(["train"]) == 2
    assert "environment variable RANK is 'two'" in capsys.readouterr().err
