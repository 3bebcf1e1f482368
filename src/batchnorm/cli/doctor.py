"""`batchnorm doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.app import DataDir, app, check_writable, names, out
from batchnorm.cli.models import DATA_HELP, ModelReference, Standardize, Weights, load_model
from batchnorm.doctor.diagnose import diagnose
from batchnorm.doctor.finding import SEVERITIES
from batchnorm.lab import references

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
    """Find what is wrong with a model's batch norms: exit code 0 is healthy, 1 findings, 2 wrong usage."""
    if fail_on not in SEVERITIES:
        raise ValueError(f"--fail-on {fail_on!r} must be one of {names(SEVERITIES)}")
    check_writable("--html", html)
    net = load_model(model, weights)
    loader = None
    if data is not None:
        loader = references.make_loader(
            data, data_dir=data_dir, batch_size=batch_size, standardize=standardize
        )
    try:
        report = diagnose(net, loader, max_batches=max_batches, progress=out.is_terminal and not as_json)
    except TypeError as error:
        raise ValueError(str(error)) from None
    out.print(report.to_json() if as_json else str(report))
    if html is not None:
        report.to_html(html)
    grave = SEVERITIES[SEVERITIES.index(fail_on) :]
    return FOUND if report.worst in grave else 0
