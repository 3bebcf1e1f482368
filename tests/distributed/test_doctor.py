"""Tests of diagnose over several processes."""

from functools import cache
from typing import Any

import pytest

from tests.distributed.doctor_cases import CASES
from tests.distributed.test_processes import run

# For all the cases of a set of processes, which train three models; on an idle 2-core machine a set takes 30.
SECONDS = 240


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank of a set of `processes` found, by case; a set runs once."""
    return cache(
        lambda processes: run(
            processes,
            tmp_path_factory.mktemp(f"{processes}-doctors"),
            "tests.distributed.doctor_cases",
            SECONDS,
        )
    )


@pytest.mark.parametrize(
    ("processes", "name"), sorted((k, name) for name, (_, sizes) in CASES.items() for k in sizes)
)
def test_processes(processes: int, name: str, results: Any) -> None:
    for rank, found in enumerate(results(processes)):
        assert name in found, f"rank {rank} did not come to it: an earlier case failed, or {found['log']}"
        assert "failure" not in found[name], f"rank {rank}: {found[name]['failure']}"
