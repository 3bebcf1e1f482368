"""`batchnorm why`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from batchnorm.cli.app import DataDir, Interrupted, app, out, progress_bar
from batchnorm.files import write_atomically
from batchnorm.lab.machine import machine_line
from batchnorm.lab.why import campaign, registry
from batchnorm.lab.why.campaign import Outcome
from batchnorm.lab.why.experiment import Scale
from batchnorm.lab.why.page import number, page
from batchnorm.lab.why.theme import LIGHT, to_png, to_svg


@app.command()
def why(
    output: Annotated[
        Path, typer.Option("--out", help="Folder for index.html, results.json, figures, and what is done.")
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME ...]",
            help=f"Names or numbers, of {registry.listed()}.  [default: all]",
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full/--quick", help="Much as in the papers, or in minutes."),
    ] = False,
    seeds: Annotated[int, typer.Option(help="Runs of each experiment, from which its intervals are.")] = 5,
    data_dir: DataDir = None,
) -> None:
    """Try the papers' claims on why batch norm works, and write them up as one page."""
    experiments = registry.chosen(names or [])
    if seeds < 1:
        raise ValueError(f"seeds {seeds} must be 1 or more; an interval needs 2, and 5 are a good number")
    if data_dir is not None:
        if not os.path.isdir(os.path.expanduser(data_dir)):
            raise ValueError(f"data folder {data_dir}: no such folder")
        os.environ["BATCHNORM_DATA"] = data_dir
    output.mkdir(parents=True, exist_ok=True)
    scale: Scale = "full" if full else "quick"
    steps = seeds * sum(experiment.steps(scale) for experiment in experiments)
    try:
        with progress_bar(steps, f"{len(experiments)} experiments, {seeds} seeds") as on_steps:
            outcomes = campaign.run(experiments, seeds, scale, output, on_steps)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the seeds that are done are in {output}; go on with: "
            f"{_command(names or [], scale, seeds, data_dir, output)}"
        ) from None
    for outcome in outcomes:
        figure = outcome.experiment.figure(outcome.results, LIGHT)
        write_atomically(output / f"{outcome.experiment.name}.png", to_png(figure))
        write_atomically(output / f"{outcome.experiment.name}.svg", to_svg(figure, "figure").encode())
    write_atomically(output / "results.json", campaign.results_json(outcomes))
    write_atomically(output / "index.html", page(outcomes))
    out.print(_table(outcomes))
    out.print(f"{machine_line()}; mean (95 % confidence interval) over {seeds} seeds; {output}/index.html")


def _command(names: list[str], scale: Scale, seeds: int, data_dir: str | None, output: Path) -> str:
    data = [] if data_dir is None else ["--data-dir", data_dir]
    return shlex.join(
        ["batchnorm", "why", *names, f"--{scale}", "--seeds", str(seeds), *data, "--out", str(output)]
    )


def _table(outcomes: list[Outcome]) -> Table:
    """A row per deciding number, under its experiment and verdict."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("experiment", "verdict", "number", "mean (interval)", "claimed"):
        table.add_column(heading)
    for outcome in outcomes:
        named = f"{outcome.experiment.number} {outcome.experiment.name}"
        verdict: str = outcome.verdict
        for measure, interval in outcome.measures:
            if measure.above is not None:
                values = f"{number(interval.mean)} ({number(interval.low)} to {number(interval.high)})"
                table.add_row(
                    named, verdict, measure.name, f"{values} {measure.unit}", f"> {measure.above:g}"
                )
                named, verdict = "", ""
    return table
