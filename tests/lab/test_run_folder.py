"""The run folder: what it writes, what it refuses, and that a checkpoint comes back whole."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.lab.data import Dataset, load
from batchnorm.lab.recipes import configure
from batchnorm.lab.run_folder import RunFolder, RunFolderError, default_output
from batchnorm.lab.train import Training


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits").head(64, 32)


@pytest.fixture
def training(digits: Dataset) -> Training:
    training = Training(configure("digits", epochs=2), digits)
    training.run_epoch()
    return training


def test_save_writes_every_file(training: Training, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a" / "run")
    training.run_epoch()
    folder.save(training)
    assert {path.name for path in folder.path.iterdir()} == {
        "checkpoint.pt",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
    }
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"epoch", "loss", "accuracy", "seconds"} <= set(lines[0])
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["config"]["data"] == "digits"
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["machine"]["cores"] >= 1
    assert (folder.path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoint_loads_with_weights_only_and_goes_back(
    training: Training, digits: Dataset, tmp_path: Path
) -> None:
    RunFolder.create(tmp_path).save(training)
    assert (
        torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"].keys()
        == training.model.state_dict().keys()
    )
    folder = RunFolder.reopen(tmp_path)
    loaded = folder.load()
    assert loaded is not None
    config, state = loaded
    assert config == training.config
    again = Training(config, digits)
    (tmp_path / "metrics.jsonl").unlink()
    folder.restore(again, state)
    assert again.history == training.history
    assert (tmp_path / "metrics.jsonl").exists()


def test_create_refuses_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty: give another --output, or --resume"):
        RunFolder.create(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_create_refuses_a_file_and_an_impossible_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(RunFolderError, match="cannot make the output folder"):
        RunFolder.create(tmp_path / "file" / "below")


def test_reopen_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no folder"):
        RunFolder.reopen(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds no checkpoint\.pt to resume from.*notes\.txt"):
        RunFolder.reopen(tmp_path)


def test_reopen_clears_what_a_kill_left_and_starts_without_a_checkpoint(tmp_path: Path) -> None:
    left = tmp_path / ".checkpoint.pt-abc.tmp"
    left.write_bytes(b"half")
    assert RunFolder.reopen(tmp_path).load() is None
    assert not left.exists()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    damaged: dict[str, Any] = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "noise": os.urandom(2000),
        "text": b"hello, world",
    }
    path.write_bytes(damaged[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "noise", "text"])
def test_a_damaged_checkpoint_is_one_clear_error(how: str, training: Training, tmp_path: Path) -> None:
    RunFolder.create(tmp_path).save(training)
    damage(tmp_path / "checkpoint.pt", how)
    with pytest.raises(RunFolderError, match=r"checkpoint\.pt is damaged, or no checkpoint") as caught:
        RunFolder.reopen(tmp_path).load()
    assert "\n" not in str(caught.value)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/batchnorm-was-here",))


@pytest.mark.parametrize("content", [{"model": 1}, [1, 2], torch.zeros(3), Payload()])
def test_a_foreign_checkpoint_is_refused_and_never_unpickled(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(RunFolderError, match=r"checkpoint\.pt is (not|damaged)"):
        RunFolder.reopen(tmp_path).load()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not Path("/tmp/batchnorm-was-here").exists()


@pytest.mark.parametrize("key", ["history", "model", "optimizer", "shuffling"])
def test_a_checkpoint_that_lacks_or_bends_a_part(
    key: str, training: Training, digits: Dataset, tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path)
    folder.save(training)
    path = tmp_path / "checkpoint.pt"
    whole = torch.load(path, weights_only=True)
    for broken in ({name: value for name, value in whole.items() if name != key}, {**whole, key: 3}):
        torch.save(broken, path)
        loaded = folder.load()
        assert loaded is not None
        with pytest.raises(RunFolderError, match="does not fit its own configuration"):
            folder.restore(Training(loaded[0], digits), loaded[1])


@pytest.mark.parametrize("config", [None, {}, {"data": "cifar"}, "text", {"device": "cuda:99"}])
def test_a_checkpoint_with_a_bad_configuration(config: Any, training: Training, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.save(training)
    whole = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if isinstance(config, dict) and config:
        config = {**whole["config"], **config}
    torch.save({**whole, "config": config}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunFolderError, match="no usable configuration"):
        folder.load()


def test_default_output_names_the_run() -> None:
    path = default_output("train", "digits", "fast")
    assert path.parts[0] == "runs"
    assert path.name.endswith("train-digits-fast")


@pytest.mark.parametrize("bent", [torch.zeros(1), torch.zeros(7, 1, 5, 5), 3.0])
def test_optimizer_state_of_another_shape_is_refused(
    bent: Any, training: Training, digits: Dataset, tmp_path: Path
) -> None:
    """torch loads it, and its fused Adam then runs over the end of the tensor."""
    folder = RunFolder.create(tmp_path)
    folder.save(training)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = bent
    with pytest.raises(RunFolderError, match="does not fit its own configuration"):
        folder.restore(Training(training.config, digits), state)


def test_results_without_their_checkpoint_are_not_overwritten(training: Training, tmp_path: Path) -> None:
    RunFolder.create(tmp_path).save(training)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(RunFolderError, match=r"holds no checkpoint\.pt to resume from"):
        RunFolder.reopen(tmp_path)
