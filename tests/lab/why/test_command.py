"""`batchnorm why`: files and a table, errors with exit code 2, and how to go on after Ctrl-C."""

import json
from pathlib import Path

import pytest

from batchnorm.cli import run
from batchnorm.lab.why import campaign, registry

from .examples import make, two_layers


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two experiments that take no time, in place of the real ones."""
    examples = {"first": make(1, "first", layers=two_layers), "second": make(2, "second", above=100)}
    monkeypatch.setattr(registry, "NAMES", {1: "first", 2: "second"})
    monkeypatch.setattr(registry, "experiment", examples.__getitem__)
    monkeypatch.chdir(tmp_path)


def test_it_writes_page_results_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["why", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "1 first" in printed
    assert "not supported" in printed
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "index.html", "results.json", "first.png", "first.svg", "second.png", "second.svg", "parts",
    }  # fmt: skip
    assert (out / "first.svg").read_text().startswith("<svg")
    results = json.loads((out / "results.json").read_text())
    assert (results["scale"], [one["seeds"] for one in results["experiments"]]) == ("quick", [5, 5])


def test_names_scale_and_seeds_are_taken(tmp_path: Path) -> None:
    assert run(["why", "2", "--full", "--seeds", "2", "--out", "out"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(one["name"], one["seeds"]) for one in results["experiments"]] == [("second", 2)]
    assert results["scale"] == "full"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["third", "--out", "out"], "no experiment 'third': expected one of 1 first, 2 second"),
        (["--seeds", "0", "--out", "out"], "seeds 0 must be 1 or more"),
        (["--data-dir", "nowhere", "--out", "out"], "data folder nowhere: no such folder"),
        (["--out", "a-file"], "a-file"),
        ([], "--out"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").touch()
    assert run(["why", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "run", interrupted)
    assert run(["why", "second", "--seeds", "3", "--out", "my out"]) == 130
    assert "go on with: batchnorm why second --quick --seeds 3 --out 'my out'" in capsys.readouterr().err
