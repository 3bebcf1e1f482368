"""Tests over several processes: synchronised layers, and running statistics that are merged."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.children import run_ranks
from tests.distributed.run import CASES

# For all the cases of a set of processes; on a 2-core machine that others use too a set takes up to 40.
SECONDS = 120


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank of a set of `processes` found, by case; a set runs once."""
    return cache(lambda processes: run(processes, tmp_path_factory.mktemp(f"{processes}-processes")))


def run(
    processes: int, folder: Path, module: str = "tests.distributed.cases", seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """What each rank leaves; where it was killed, cases are missing."""
    run_ranks("tests.distributed.run", processes, folder, seconds, module)
    return [result(folder, rank) for rank in range(processes)]


def result(folder: Path, rank: int) -> dict[str, Any]:
    found = folder / f"{rank}.json"
    log = (folder / f"{rank}.log").read_text()[-2000:]
    return {"log": log} | (json.loads(found.read_text()) if found.exists() else {})


@pytest.mark.parametrize(
    ("processes", "name"), sorted((k, name) for name, (_, sizes) in CASES.items() for k in sizes)
)
def test_processes(processes: int, name: str, results: Any) -> None:
    assert_passed(name, results(processes))


def assert_passed(name: str, of_ranks: list[dict[str, Any]]) -> None:
    """A case, by what each rank found."""
    for rank, found in enumerate(of_ranks):
        assert name in found, f"rank {rank} did not come to it: an earlier case failed, or {found['log']}"
        assert "failure" not in found[name], f"rank {rank}: {found[name]['failure']}"
