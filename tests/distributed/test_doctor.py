"""Tests of diagnose over several processes."""

from functools import cache
from typing import Any

import pytest

from tests.distributed.doctor_trouble_cases import CASES
from tests.distributed.test_processes import assert_passed, run

# For all the cases of a set of processes, which train three models; on an idle 2-core machine a set takes 30.
SECONDS = 240


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank of a set of `processes` found, by case; a set runs once."""
    return cache(
        lambda processes: run(
            processes,
            tmp_path_factory.mktemp(f"{processes}-doctors"),
            "tests.distributed.doctor_trouble_cases",
            SECONDS,
        )
    )


@pytest.mark.parametrize(
    ("processes", "name"), sorted((k, name) for name, (_, sizes) in CASES.items() for k in sizes)
)
def test_processes(processes: int, name: str, results: Any) -> None:
    assert_passed(name, results(processes))
