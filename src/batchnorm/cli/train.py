"""`batchnorm train` and `batchnorm compare`."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from batchnorm.checks import first_line
from batchnorm.cli.app import DataDir, Interrupted, app, names, out, progress_bar
from batchnorm.files import write_atomically
from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.lab import figures, tables
from batchnorm.lab.compare import compare as run_comparison
from batchnorm.lab.data import DATASETS
from batchnorm.lab.machine import machine_line
from batchnorm.lab.nets import NORMS
from batchnorm.lab.pace import pace_line
from batchnorm.lab.processes import ProcessError, World, is_of_another_process, joined
from batchnorm.lab.recipes import DTYPES, RECIPES, Config, configure
from batchnorm.lab.run_folder import RunFolder, RunFolderError, default_output
from batchnorm.lab.train import EpochResult, Training, load_dataset

# Options that `train` and `compare` share; what is not given is decided by the recipe.
Data = Annotated[str | None, typer.Option(help=f"Data set: {names(DATASETS)}.  [default: digits]")]
Recipe = Annotated[str | None, typer.Option(help=f"Recipe: {names(RECIPES)}.  [default: tutorial]")]
BatchSize = Annotated[int | None, typer.Option(help="Images per step, of all processes together.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Adam's rate; the peak of one-cycle.")]
Activation = Annotated[str | None, typer.Option(help=f"Activation: {names(ACTIVATIONS)}.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the weights and of the shuffling.  [default: 0]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto.  [default: auto]")]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"{names(DTYPES)}; the half precisions train under autocast.  [default: float32]"),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.  [default: by the batch size]")]
TrainSamples = Annotated[int | None, typer.Option(help="Keep so many of the training images.")]
TestSamples = Annotated[int | None, typer.Option(help="Keep so many of the test images.")]


@app.command()
def train(
    context: typer.Context,
    data: Data = None,
    recipe: Recipe = None,
    norm: Annotated[str | None, typer.Option(help=f"Norm: {names(NORMS)}.  [default: batchnorm]")] = None,
    batch_size: BatchSize = None,
    epochs: Epochs = None,
    lr: LearningRate = None,
    activation: Activation = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    train_samples: TrainSamples = None,
    test_samples: TestSamples = None,
    tutorial_protocol: Annotated[
        bool | None,
        typer.Option(
            "--tutorial-protocol", help="The tutorial's loss formula, and its test in training mode."
        ),
    ] = None,
    sync: Annotated[
        bool | None, typer.Option("--sync", help="Statistics over the batches of all processes (torchrun).")
    ] = None,
    data_dir: DataDir = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for metrics, summary, curves and checkpoint.  [default: in runs/]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
) -> None:
    """Train LeNet, by default with batchnorm on scanned digits; resumable at any moment.

    In several processes by: torchrun --nproc-per-node 2 -m batchnorm train
    """
    options = _settings(context)
    with joined() as world:
        _train(options, world, data_dir, output, resume)


def _train(
    options: dict[str, Any], world: World, data_dir: str | None, output: Path | None, resume: bool
) -> None:
    with world.together():
        training, folder = _prepared(options, world, data_dir, output, resume)
    _run(training, folder)


def _prepared(
    options: dict[str, Any], world: World, data_dir: str | None, output: Path | None, resume: bool
) -> tuple[Training, RunFolder | None]:
    """The training, new or where it was, and the folder that rank 0 writes it to."""
    if resume and output is None:
        raise RunFolderError("--resume needs --output, the folder of the run to go on with")
    saved = RunFolder.reopen(output).load() if resume and output is not None else None
    config = configure(**options) if saved is None else saved[0]
    if saved is not None:
        _check_same(options, config, output)
        data_dir = saved[1]["data_dir"] if data_dir is None else data_dir
        if not world.alone and "threads" not in options:
            config = replace(config, threads=min(config.threads, torch.get_num_threads()))
    dataset = load_dataset(config, data_dir)
    training = Training(config, dataset, world)
    if saved is not None and output is not None:
        RunFolder(output).restore(training, saved[1])
    if world.rank > 0:
        return training, None
    if output is None:
        output = default_output("train", config.data, config.recipe, config.norm)
    folder = RunFolder.reopen(output) if resume else RunFolder.create(output)
    folder.data_dir = None if data_dir is None else str(Path(data_dir).expanduser().absolute())
    if saved is None:
        folder.save(training)
    return training, folder


def _run(training: Training, folder: RunFolder | None) -> None:
    config, world = training.config, training.world
    if folder is not None:
        out.print(_headline(training, folder))
    for result in training.history:
        out.print(_epoch_line(config, result), style="dim")
    try:
        while not training.finished:
            with progress_bar(training.steps_per_epoch, f"epoch {len(training.history) + 1}") as on_steps:
                result = training.run_epoch(on_steps)
            if folder is not None:
                folder.save(training)
            out.print(_epoch_line(config, result))
        out.print(pace_line(training.history))
    except KeyboardInterrupt:
        world.finish_in_peace()
        if folder is not None:
            folder.write_results(training, interrupted=True)
        done = len(training.history)
        raise Interrupted(
            f"interrupted after {done} of {config.epochs} epochs; go on with: {_go_on(world, folder)}"
        ) from None
    except RuntimeError as error:
        if world.alone or not is_of_another_process(error):
            raise
        world.finish_in_peace()
        if folder is not None:
            folder.write_results(training, interrupted=True)
        raise ProcessError(
            f"rank {world.rank} of {world.size} lost another process in epoch {len(training.history) + 1}: "
            f"{first_line(error)}; go on, with any number of processes, by: {_go_on(world, folder)}"
        ) from error


def _headline(training: Training, folder: RunFolder) -> str:
    config, world = training.config, training.world
    statistics = "synchronised" if config.sync else "their own"
    several = "" if world.alone else f", {world.size} processes with statistics {statistics}"
    return (
        f"LeNet, norm {config.norm}, on {config.data}: {config.recipe} recipe, batch size "
        f"{config.batch_size}, {config.device}{several}; output in {folder.path}"
    )


def _go_on(world: World, folder: RunFolder | None) -> str:
    start = "batchnorm" if world.alone else f"torchrun --nproc-per-node {world.local_size} -m batchnorm"
    return f"{start} train --resume --output {'OUTPUT' if folder is None else shlex.quote(str(folder.path))}"


def _epoch_line(config: Config, result: EpochResult) -> str:
    line = (
        f"epoch {result.epoch}, batch size {config.batch_size}, train loss {result.loss:.6f}, "
        f"time {result.seconds:.2f} s, accuracy {result.accuracy:.4f}"
    )
    if result.accuracy_eval is None:
        return line
    return f"{line} (test-batch statistics), {result.accuracy_eval:.4f} (running statistics)"


@app.command()
def compare(
    context: typer.Context,
    norms: Annotated[str, typer.Option(help=f"Comma-separated, of {names(NORMS)}.")] = ",".join(NORMS),
    seeds: Annotated[int, typer.Option(help="Runs of each norm, with seeds counted from --seed.")] = 3,
    data: Data = None,
    recipe: Recipe = None,
    batch_size: BatchSize = None,
    epochs: Epochs = None,
    lr: LearningRate = None,
    activation: Activation = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    train_samples: TrainSamples = None,
    test_samples: TestSamples = None,
    data_dir: DataDir = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for comparison.json and comparison.png.  [default: in runs/]")
    ] = None,
) -> None:
    """Train with several norms and seeds in turn, and print and plot what each gives."""
    chosen = [norm.strip() for norm in norms.split(",") if norm.strip()]
    if not chosen or seeds < 1 or len(set(chosen)) < len(chosen):
        raise ValueError("compare needs one norm or more, each once, and 1 seed or more")
    options = _settings(context)
    configs = [configure(norm=norm, **options) for norm in chosen]
    dataset = load_dataset(configs[0], data_dir)
    folder = RunFolder.create(
        default_output("compare", configs[0].data, configs[0].recipe) if output is None else output
    )
    steps = configs[0].epochs * seeds * len(chosen) * Training(configs[0], dataset).steps_per_epoch
    with progress_bar(steps, f"{len(chosen)} norms, {seeds} seeds") as on_steps:
        result = run_comparison(configs[0], dataset, chosen, seeds, on_steps)
    write_atomically(
        folder.path / "comparison.json", (json.dumps(result.as_dict(), indent=2) + "\n").encode()
    )
    write_atomically(folder.path / "comparison.png", figures.comparison(result))
    out.print(tables.comparison(result))
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"
    out.print(f"{machine_line()}; {spread}; results in {folder.path}")


def _settings(context: typer.Context) -> dict[str, Any]:
    """The options that were given and belong to a run's configuration."""
    names = {field.name for field in fields(Config)}
    return {name: value for name, value in context.params.items() if name in names and value is not None}


def _check_same(options: dict[str, Any], config: Config, output: Path | None) -> None:
    for name, value in options.items():
        saved = getattr(config, name)
        if value != saved and not (name == "device" and value == "auto"):
            raise RunFolderError(
                f"the run in {output} has {name} {saved}, not {value}: leave the option out to resume it"
            )
