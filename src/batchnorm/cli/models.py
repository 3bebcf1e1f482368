"""Commands on a model given by reference: `batchnorm recalibrate` and `batchnorm fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from batchnorm.cli.app import DataDir, app, errors, names, out
from batchnorm.files import check_new_file, write_new_file
from batchnorm.lab import references, tables
from batchnorm.lab.data import DATASETS
from batchnorm.lab.deploy import WRITERS
from batchnorm.lab.processes import World, as_on_rank_0, joined
from batchnorm.model import fold as run_fold
from batchnorm.model import recalibrate as run_recalibrate

ModelReference = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="package.module:factory, a function that makes the model."),
]
Weights = Annotated[
    Path | None, typer.Option(help="Its weights: safetensors, or a checkpoint of tensors.  [default: none]")
]
DATA_HELP = f"{names(DATASETS)}, or package.module:loader, a function."
Standardize = Annotated[
    bool, typer.Option("--standardize", help="Pixels of a built-in data set with mean 0 and deviation 1.")
]


@app.command()
def recalibrate(
    model: ModelReference,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    output: Annotated[Path, typer.Option(help="New file for the weights: .safetensors, .pt or .pth.")],
    weights: Weights = None,
    data_dir: DataDir = None,
    batch_size: Annotated[int, typer.Option(help="Images of a built-in data set at a time.")] = 256,
    standardize: Standardize = False,
    max_batches: Annotated[int | None, typer.Option(help="Take so many batches.  [default: all]")] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Layer by layer: exact for deep layers, a pass for each.")
    ] = False,
) -> None:
    """Replace a model's running statistics by those of the data, and write its weights to a new file.

    In several processes by: torchrun --nproc-per-node 2 -m batchnorm recalibrate
    """
    with joined() as world, world.together():
        with world.together():
            check_new_file("--output", output, references.WEIGHT_FILES)
        net, loader = load_model_and_data(
            world, model, weights, data, data_dir, batch_size, standardize, max_batches
        )
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        run_recalibrate(
            net,
            loader,
            max_batches=max_batches,
            sequential=sequential,
            progress=out.is_terminal and world.rank == 0,
            group=None if world.alone else torch.distributed.group.WORLD,
        )
        out.print(tables.moved_statistics(net, before))
        if world.rank == 0:
            write_new_file(output, references.weights_as_bytes(net, output.suffix))
        out.print(f"recalibrated weights in {output}")


@app.command()
def fold(
    model: ModelReference,
    output: Annotated[Path, typer.Option(help=f"New file for the folded model: {names(WRITERS)}.")],
    weights: Weights = None,
    example: Annotated[
        str | None, typer.Option(help="Shape of an input, such as 1x3x224x224: normal numbers are tried.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    data_dir: DataDir = None,
    standardize: Standardize = False,
) -> None:
    """Fold a model's batch norms into its other layers, check the result, and write it to a new file."""
    check_new_file("--output", output, tuple(WRITERS))
    net = load_model(model, weights)
    if example is not None and data is None:
        batch = references.example_input(example)
    elif data is not None and example is None:
        loader = references.make_loader(data, data_dir=data_dir, standardize=standardize)
        batch = references.first_input(loader, data)
    else:
        raise ValueError("give an input to check with: either --example or --data")
    folded = run_fold(net, batch)
    out.print(str(folded.fold_report))
    write_new_file(output, WRITERS[output.suffix](folded, batch))
    out.print(f"folded model in {output}")


def load_model_and_data(
    world: World,
    model: str,
    weights: Path | None,
    data: str | None,
    data_dir: str | None,
    batch_size: int,
    standardize: bool,
    max_batches: int | None,
) -> tuple[nn.Module, Any]:
    """The model, in every process as in rank 0, and the loader of this process's part of the data, if any."""
    with world.together():
        net = load_model(model, weights)
        loader = None
        if data is not None:
            loader = references.make_loader(
                data,
                data_dir=data_dir,
                batch_size=batch_size,
                standardize=standardize,
                max_batches=max_batches,
                world=world,
            )
    if not world.alone:
        as_on_rank_0(net)
    return net, loader


def load_model(reference: str, weights: Path | None) -> nn.Module:
    """What the factory makes, with the weights of a file where there is one."""
    model = references.make_model(reference)
    if weights is not None:
        said = references.load_weights(model, weights)
        if said:
            errors.print(f"{weights}: {said}")
    return model
