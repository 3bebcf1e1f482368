"""Sizes of tiles: what is chosen by times that are made up, and what the trials leave behind."""

import pytest
import torch

from batchnorm.kernels.cuda import plan as planning
from batchnorm.lab.tile_sizes import CANDIDATES, best, constants


def current() -> dict[str, int]:
    return {name: getattr(planning, name) for name in CANDIDATES}


def test_the_fastest_are_found_and_nothing_stays_changed() -> None:
    before = current()
    wanted = {name: candidates[-1] for name, candidates in CANDIDATES.items()} | {"TILE": 2048}
    tried = []

    def seconds() -> float:
        wrong = sum(value != wanted[name] for name, value in current().items())
        return 1.0 + 0.1 * wrong

    assert best(seconds, lambda values, time: tried.append((tuple(values.values()), time))) == wanted
    assert len(tried) == len({values for values, _ in tried})  # nothing is timed twice
    assert current() == before


def test_noise_changes_nothing_and_what_cannot_run_is_not_chosen() -> None:
    before = current()

    def seconds() -> float:
        if current()["WHOLE_FORWARD"] > before["WHOLE_FORWARD"]:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if current() == before else 0.999

    assert best(seconds) == before


def test_plans_are_made_by_the_constants_that_are_set() -> None:
    def cut() -> planning.Cut:
        x = torch.empty((64, 64, 56, 56), device="meta")
        the_plan = planning.plan(x.shape, x.stride(), torch.float32, 1, 132)
        assert the_plan is not None
        return the_plan.passes

    before = cut()
    with constants({"TILE": 2048}):
        assert cut().height * cut().width == 2048 < before.height * before.width
    assert cut() == before
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert cut() == before


def interrupted() -> None:
    with constants({"TILE": 2048}):
        raise KeyboardInterrupt
