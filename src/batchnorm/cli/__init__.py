"""The `batchnorm` command: a thin layer over the verbs and the lab, one file per family of commands."""

from __future__ import annotations

import sys

import typer

from batchnorm.cli import bench, doctor, models, train, why
from batchnorm.cli.app import Interrupted, app
from batchnorm.lab.processes import FailedElsewhere, ProcessError, is_rank_0

__all__ = ["bench", "doctor", "models", "run", "train", "why"]

INTERRUPTED = 130


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; whatever is wrong with the input is one line and 2."""
    command = typer.main.get_command(app)
    try:
        code = command(arguments, prog_name="batchnorm", standalone_mode=False) or 0
    except Interrupted as error:
        return _complain(str(error), INTERRUPTED)
    except FailedElsewhere:
        return 2
    except ProcessError as error:
        return _complain(str(error), everywhere=True)
    except (ValueError, OSError) as error:
        return _complain(str(error))
    except Exception as error:
        # typer ships its own copy of click or uses click's, by version: its errors are told by what they do.
        if hasattr(error, "format_message"):
            return _complain(error.format_message())
        raise
    # typer makes a code of Ctrl-C, without a word.
    return _complain("interrupted", code) if code == INTERRUPTED else code


def _complain(message: str, code: int = 2, *, everywhere: bool = False) -> int:
    """Say it once: of several processes by rank 0, unless it is about this one."""
    if everywhere or is_rank_0():
        print("batchnorm:", " ".join(message.split()), file=sys.stderr)
    return code
