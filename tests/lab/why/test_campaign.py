"""A campaign keeps every seed that is done, reuses it, and is what it would be without an interruption."""

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from batchnorm.lab.why import campaign
from batchnorm.lab.why.experiment import Experiment, Scale, SeedResult

from .examples import make


class Counting:
    """A run that remembers its seeds, and is interrupted once at one of them."""

    def __init__(self, interrupted_at: int | None = None) -> None:
        self.seeds: list[int] = []
        self.interrupted_at = interrupted_at

    def experiment(self, name: str = "counting") -> Experiment:
        def run(seed: int, scale: Scale, on_steps: Callable[[int], None]) -> SeedResult:
            if seed == self.interrupted_at:
                self.interrupted_at = None
                raise KeyboardInterrupt
            self.seeds.append(seed)
            on_steps(1)
            return {"value": seed / 3}

        return make(1, name, run=run)


def test_an_interruption_loses_nothing(tmp_path: Path) -> None:
    counting, steps = Counting(interrupted_at=2), []
    with pytest.raises(KeyboardInterrupt):
        campaign.run([counting.experiment()], 4, "quick", tmp_path)
    (outcome,) = campaign.run([counting.experiment()], 4, "quick", tmp_path, steps.append)
    assert counting.seeds == [0, 1, 2, 3]
    assert sum(steps) == 4
    (whole,) = campaign.run([Counting().experiment()], 4, "quick", tmp_path / "other")
    assert outcome.results == whole.results
    assert outcome.as_dict() | {"seconds": 0} == whole.as_dict() | {"seconds": 0}


def test_more_seeds_and_other_experiments_reuse_what_is_there(tmp_path: Path) -> None:
    counting, other = Counting(), Counting()
    campaign.run([counting.experiment()], 2, "quick", tmp_path)
    campaign.run([counting.experiment(), other.experiment("other")], 3, "quick", tmp_path)
    assert (counting.seeds, other.seeds) == ([0, 1, 2], [0, 1, 2])


def test_another_scale_or_source_is_run_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    campaign.run([counting.experiment()], 1, "quick", tmp_path)
    campaign.run([counting.experiment()], 1, "full", tmp_path)
    campaign.run([counting.experiment()], 1, "quick", tmp_path)
    assert counting.seeds == [0, 0]
    monkeypatch.setattr(campaign, "_source_of", lambda module: "something else")
    campaign.run([counting.experiment()], 1, "quick", tmp_path)
    assert counting.seeds == [0, 0, 0]


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"key": {}}', b"\xff\xfe"])
def test_a_broken_part_is_run_anew(tmp_path: Path, content: bytes) -> None:
    counting = Counting()
    campaign.run([counting.experiment()], 1, "quick", tmp_path)
    (part,) = (tmp_path / campaign.PARTS).iterdir()
    part.write_bytes(content)
    (outcome,) = campaign.run([counting.experiment()], 1, "quick", tmp_path)
    assert counting.seeds == [0, 0]
    assert outcome.results == [{"value": 0.0}]


def test_docstrings_do_not_count_as_source() -> None:
    code = campaign._code
    one, same, other = (
        ast.parse(text) for text in ('"""A."""\nx = 1', '"""B."""\nx  =  1 # b', '"""A."""\nx = 2')
    )
    assert code(one) == code(same) != code(other)


def test_results_are_strict_json_with_verdict_and_machine(tmp_path: Path) -> None:
    def run(seed: int, scale: Scale, on_steps: Callable[[int], None]) -> SeedResult:
        return {"value": math.nan if seed == 0 else 1.0}

    experiments = [make(1, "good"), make(2, "bad", above=100), make(3, "odd", run=run)]
    content = json.loads(
        campaign.results_json(campaign.run(experiments, 5, "quick", tmp_path)),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    verdicts = [one["verdict"] for one in content["experiments"]]
    assert verdicts == ["supported", "not supported", "undecided here"]
    first, last = content["experiments"][0]["measures"][0], content["experiments"][2]["measures"][0]
    assert (first["mean"], first["values"]) == (3.0, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (last["mean"], last["low"], last["values"][0]) == (None, None, None)
    assert content["machine"]["cores"] >= 1
    assert content["versions"]["torch"] == torch.__version__
