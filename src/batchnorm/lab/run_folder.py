"""The output folder of a training run: metrics, summary, curves and a checkpoint, each written atomically."""

from __future__ import annotations

import io
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from batchnorm.checks import first_line
from batchnorm.files import TEMPORARY, write_atomically
from batchnorm.lab import figures
from batchnorm.lab.machine import machine, versions
from batchnorm.lab.recipes import Config
from batchnorm.lab.train import Training

CHECKPOINT, METRICS, SUMMARY, CURVES = "checkpoint.pt", "metrics.jsonl", "summary.json", "curves.png"

_FORMAT = "batchnorm train checkpoint 1"


class RunFolderError(ValueError):
    """An output folder, or a checkpoint in it, that cannot be used."""


class RunFolder:
    """The files of one run.

    The checkpoint is written first and holds the results of all epochs so far; the other files follow
    from it. So a run that is killed at any moment goes on from its last checkpoint, and loses nothing
    but the epoch it was in.

    Attributes:
        data_dir: folder of the data files, kept in the checkpoint for whoever resumes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data_dir: str | None = None

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """A new or empty folder. RunFolderError when there is something in it, or it cannot be made."""
        folder = cls(Path(path))
        if folder._list():
            raise RunFolderError(
                f"{path} is not empty: give another --output, or --resume to go on with the run in it"
            )
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot make the output folder {path}: {error.strerror}") from None
        return folder

    @classmethod
    def reopen(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run. RunFolderError when it is none."""
        folder = cls(Path(path))
        if not folder.path.is_dir():
            raise RunFolderError(f"there is no folder {path} to resume from")
        found = folder._list()
        if found and CHECKPOINT not in found:
            raise RunFolderError(
                f"{path} holds no {CHECKPOINT} to resume from (found {', '.join(sorted(found)[:3])})"
            )
        for left_behind in folder.path.glob(f".*{TEMPORARY}"):
            left_behind.unlink(missing_ok=True)  # each process of several tries
        return folder

    def save(self, training: Training) -> None:
        """Write the checkpoint, and all that follows from it."""
        saved = io.BytesIO()
        torch.save(
            {
                "format": _FORMAT,
                "config": training.config.as_dict(),
                "data_dir": self.data_dir,
                **training.state_dict(),
            },
            saved,
        )
        self._write(CHECKPOINT, saved.getvalue())
        self.write_results(training)

    def write_results(self, training: Training, *, interrupted: bool = False) -> None:
        """Write metrics and summary, and the curves of a run that ends here: they take half a second."""
        status = "finished" if training.finished else "interrupted" if interrupted else "running"
        epochs = [result.as_dict() for result in training.history]
        self._write(METRICS, "".join(json.dumps(epoch) + "\n" for epoch in epochs).encode())
        summary = {
            "status": status,
            "result": epochs[-1] if epochs else None,
            "training_seconds": sum(result.seconds for result in training.history),
            "config": training.config.as_dict(),
            "processes": training.world.size,
            "versions": versions(),
            "machine": machine(),
        }
        self._write(SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        if epochs and status != "running":
            self._write(CURVES, figures.training_curves(training.config, training.history))

    def load(self) -> tuple[Config, dict[str, Any]] | None:
        """Configuration and state of the checkpoint, or None when the run was killed before its first."""
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever bytes that are no checkpoint may raise
            raise RunFolderError(
                f"{path} is damaged, or no checkpoint: {first_line(error)}. Start again in another folder"
            ) from None
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise RunFolderError(f"{path} is not a checkpoint of batchnorm train; it was left as it is")
        try:
            data_dir = state["data_dir"]
            if data_dir is not None and not isinstance(data_dir, str):
                raise ValueError("its data folder is no path")
            return Config(**state["config"]), state
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunFolderError(f"{path} has no usable configuration: {first_line(error)}") from None

    def restore(self, training: Training, state: dict[str, Any]) -> None:
        """Put a loaded state into a Training, and the other files back in step with it."""
        try:
            training.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise RunFolderError(
                f"{self.path / CHECKPOINT} does not fit its own configuration: {first_line(error)}"
            ) from None
        if training.world.rank == 0:
            self.write_results(training)

    def _list(self) -> set[str]:
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file: give a folder as --output")
        if not self.path.exists():
            return set()
        return {entry.name for entry in self.path.iterdir() if not entry.name.endswith(TEMPORARY)}

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_atomically(self.path / name, content)
        except OSError as error:
            raise RunFolderError(f"cannot write {self.path / name}: {error.strerror}") from None


def default_output(kind: str, *words: str) -> Path:
    """A folder under runs/ named by the time, the kind of run and what tells it from others."""
    return Path("runs") / "-".join([datetime.now().strftime("%Y%m%d-%H%M%S"), kind, *words])
