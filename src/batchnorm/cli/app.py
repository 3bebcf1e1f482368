"""What the commands share: the app, the terminal, a progress bar, and an interruption."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batchnorm.lab.processes import World


class _ByUse(typer.core.TyperGroup):
    """Lists the commands in the order in which people meet them."""

    def list_commands(self, ctx: Any) -> list[str]:
        order = ("train", "compare", "doctor", "why", "bench", "recalibrate", "fold")
        return sorted(super().list_commands(ctx), key=order.index)


app = typer.Typer(
    name="batchnorm",
    cls=_ByUse,
    help="Batch normalization done right for PyTorch: verbs on models, and the lab's experiments.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False, soft_wrap=True, markup=False)
errors = Console(highlight=False, soft_wrap=True, markup=False, stderr=True)

DataDir = Annotated[
    str | None,
    typer.Option(help="Folder with the IDX files.  [default: $BATCHNORM_DATA, else downloaded]"),
]
_FOR_PROCESSES = ("train", "doctor", "recalibrate")


@app.callback()
def main(context: typer.Context) -> None:
    """Batch normalization done right for PyTorch: verbs on models, and the lab's experiments."""
    world = World.from_environment()
    out.quiet = errors.quiet = world.rank > 0
    if not world.alone and context.invoked_subcommand not in _FOR_PROCESSES:
        raise ValueError(
            f"{context.invoked_subcommand} runs in one process: start it without torchrun (of the commands, "
            f"{names(_FOR_PROCESSES)} run in several)"
        )


def check_writable(option: str, path: Path | None) -> None:
    """Raise ValueError unless a file of that path, if any, can be written: before any work is done."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"{option} {path} cannot be written: give a file in a folder that can be written to")


class Interrupted(Exception):
    """Ctrl-C, with what to do next."""


def names(choices: Any) -> str:
    """The choices as a help text or an error lists them."""
    return ", ".join(choices)


@contextmanager
def progress_bar(steps: int, what: str) -> Iterator[Any]:
    """A bar of so many steps, where there is a terminal; yields what to call with the steps that are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task(what, total=steps)
        yield lambda done: progress.advance(task, done)
