"""`batchnorm doctor`: what it prints and writes, its exit codes, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch

from batchnorm.cli import run
from batchnorm.lab.references import make_model

MODULE = """
from torch import nn, randn
def healthy():
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
def sick():
    model = healthy()
    model[1].momentum = 0.9
    return model
def plain(): return nn.Linear(4, 2)
def batches(): return [(randn(16, 4), 0) for _ in range(3)]
def empty(): return []
def wrong(): return [randn(16, 3)]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "patients.py").write_text(MODULE)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["patients:healthy"], 0),
        (["patients:healthy", "--fail-on", "note"], 1),
        (["patients:sick"], 1),
        (["patients:sick", "--fail-on", "error"], 0),
        (["patients:plain"], 0),
        (["patients:sick", "--data", "patients:batches", "--max-batches", "2"], 1),
        (["patients:healthy", "--data", "patients:wrong"], 1),
    ],
)
def test_exit_codes(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", *arguments]) == code
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["patients:nobody"], "has no nobody"),
        (["patients:sick", "--fail-on", "panic"], "--fail-on 'panic' must be one of note, warning, error"),
        (["patients:sick", "--html", "nowhere/page.html"], "cannot be written"),
        (["patients:sick", "--data", "patients:empty"], "the loader is empty"),
        (["patients:sick", "--data", "patients:batches", "--max-batches", "0"], "max_batches=0"),
        (["patients:sick", "--weights", "none.pt"], "there is no file none.pt"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_json_and_a_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["doctor", "patients:sick", "--json", "--html", "page.html", "--data", "patients:batches"]) == 1
    )
    read = json.loads(capsys.readouterr().out)
    assert "BN106" in [finding["code"] for finding in read["findings"]]
    assert "BN106" in (here / "page.html").read_text()


def test_weights_are_loaded_before_the_diagnosis(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_model("patients:healthy").state_dict()
    state["1.running_var"][2] = -1
    torch.save(state, here / "w.pt")
    assert run(["doctor", "patients:healthy", "--weights", "w.pt"]) == 1
    assert re.search(
        r"BN109 .*\n +1: running variance is negative in 1 of 6 channels", capsys.readouterr().out
    )


class Bomb:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("exploded"),)


def test_weights_that_do_not_match_or_would_run_code_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"bomb": Bomb()}, here / "bomb.pt")
    assert run(["doctor", "patients:healthy", "--weights", "bomb.pt"]) == 2
    assert "no checkpoint of tensors alone" in capsys.readouterr().err
    assert not (here / "exploded").exists()
    torch.save(make_model("patients:plain").state_dict(), here / "other.pt")
    assert run(["doctor", "patients:healthy", "--weights", "other.pt"]) == 2
    assert "which the model has" in capsys.readouterr().err
