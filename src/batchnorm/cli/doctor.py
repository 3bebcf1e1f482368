"""`batchnorm doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from batchnorm.cli.app import DataDir, app, check_writable, names, out
from batchnorm.cli.models import DATA_HELP, ModelReference, Standardize, Weights, load_model_and_data
from batchnorm.doctor.diagnose import diagnose
from batchnorm.doctor.finding import SEVERITIES
from batchnorm.lab.processes import joined

FOUND = 1


@app.command()
def doctor(
    model: ModelReference,
    weights: Weights = None,
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP}  [default: no data]")] = None,
    data_dir: DataDir = None,
    batch_size: Annotated[int, typer.Option(help="Images of a built-in data set at a time.")] = 32,
    standardize: Standardize = False,
    max_batches: Annotated[int, typer.Option(help="Take so many batches.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="File for a page with a picture of every layer.")] = None,
    fail_on: Annotated[
        str, typer.Option(help=f"Exit with 1 from this severity on: {names(SEVERITIES)}.")
    ] = "warning",
) -> int:
    """Find what is wrong with a model's batch norms: exit code 0 is healthy, 1 findings, 2 wrong usage.

    In several processes by: torchrun --nproc-per-node 2 -m batchnorm doctor. Of two each takes every second
    batch of a built-in data set; a loader of one's own is called in each process and gives its part.
    """
    if fail_on not in SEVERITIES:
        raise ValueError(f"--fail-on {fail_on!r} must be one of {names(SEVERITIES)}")
    with joined() as world, world.together():
        with world.together():
            if world.rank == 0:
                check_writable("--html", html)
        net, loader = load_model_and_data(
            world, model, weights, data, data_dir, batch_size, standardize, max_batches
        )
        try:
            report = diagnose(
                net,
                loader,
                max_batches=max_batches,
                progress=out.is_terminal and not as_json and world.rank == 0,
                group=None if world.alone else torch.distributed.group.WORLD,
            )
        except TypeError as error:
            raise ValueError(str(error)) from None
        out.print(report.to_json() if as_json else str(report))
        if html is not None and world.rank == 0:
            report.to_html(html)
    grave = SEVERITIES[SEVERITIES.index(fail_on) :]
    if report.worst not in grave:
        return 0
    world.finish_in_peace()  # torchrun ends the others as soon as one exits with what is not 0
    return FOUND
