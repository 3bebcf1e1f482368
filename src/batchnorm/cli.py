"""The `batchnorm` command: a thin layer over the lab."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.lab import bench as benchmark
from batchnorm.lab import figures, references, tables
from batchnorm.lab.bench import CASES, SHAPES
from batchnorm.lab.bench_nets import measure_nets
from batchnorm.lab.compare import compare as run_comparison
from batchnorm.lab.data import DATASETS
from batchnorm.lab.deploy import WRITERS
from batchnorm.lab.files import check_new_file, write_atomically, write_new_file
from batchnorm.lab.machine import machine_line
from batchnorm.lab.nets import NORMS
from batchnorm.lab.recipes import DTYPES, MOST_THREADS, RECIPES, Config, configure, resolve_device
from batchnorm.lab.run_folder import RunFolder, RunFolderError, default_output
from batchnorm.lab.train import EpochResult, Training, load_dataset
from batchnorm.model import fold as run_fold
from batchnorm.model import recalibrate as run_recalibrate

INTERRUPTED = 130

# A step of a network takes longer than a layer's.
_NET_SECONDS = 10

app = typer.Typer(
    name="batchnorm",
    help="Batch normalization done right for PyTorch: the lab's experiments.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False, soft_wrap=True, markup=False)


def _names(choices: Any) -> str:
    return ", ".join(choices)


# Options that `train` and `compare` share; what is not given is decided by the recipe.
Data = Annotated[str | None, typer.Option(help=f"Data set: {_names(DATASETS)}.  [default: digits]")]
Recipe = Annotated[str | None, typer.Option(help=f"Recipe: {_names(RECIPES)}.  [default: tutorial]")]
DataDir = Annotated[
    str | None,
    typer.Option(help="Folder with the IDX files.  [default: $BATCHNORM_DATA, else downloaded]"),
]
BatchSize = Annotated[int | None, typer.Option(help="Images per step.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Adam's rate; the peak of one-cycle.")]
Activation = Annotated[str | None, typer.Option(help=f"Activation: {_names(ACTIVATIONS)}.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the weights and of the shuffling.  [default: 0]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps or auto.  [default: auto]")]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"{_names(DTYPES)}; the half precisions train under autocast.  [default: float32]"),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.  [default: by the batch size]")]
TrainSamples = Annotated[int | None, typer.Option(help="Keep so many of the training images.")]
TestSamples = Annotated[int | None, typer.Option(help="Keep so many of the test images.")]


@app.callback()
def main() -> None:
    """Batch normalization done right for PyTorch: the lab's experiments."""


@app.command()
def train(
    context: typer.Context,
    data: Data = None,
    recipe: Recipe = None,
    norm: Annotated[str | None, typer.Option(help=f"Norm: {_names(NORMS)}.  [default: batchnorm]")] = None,
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
    data_dir: DataDir = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for metrics, summary, curves and checkpoint.  [default: in runs/]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
) -> None:
    """Train LeNet, by default with batchnorm on scanned digits; resumable at any moment."""
    options = _settings(context)
    if resume and output is None:
        raise RunFolderError("--resume needs --output, the folder of the run to go on with")
    saved = RunFolder.reopen(output).load() if resume and output is not None else None
    config = configure(**options) if saved is None else saved[0]
    if saved is not None:
        _check_same(options, config, output)
        data_dir = saved[1]["data_dir"] if data_dir is None else data_dir
    dataset = load_dataset(config, data_dir)
    if output is None:
        output = default_output("train", config.data, config.recipe, config.norm)
    folder = RunFolder.reopen(output) if resume else RunFolder.create(output)
    folder.data_dir = None if data_dir is None else str(Path(data_dir).expanduser().absolute())
    training = Training(config, dataset)
    if saved is None:
        folder.save(training)
    else:
        folder.restore(training, saved[1])
    _run(training, folder)


def _run(training: Training, folder: RunFolder) -> None:
    config = training.config
    out.print(
        f"LeNet, norm {config.norm}, on {config.data}: {config.recipe} recipe, batch size "
        f"{config.batch_size}, {config.device}; output in {folder.path}"
    )
    for result in training.history:
        out.print(_epoch_line(config, result), style="dim")
    try:
        while not training.finished:
            with _progress(training.steps_per_epoch, f"epoch {len(training.history) + 1}") as on_steps:
                result = training.run_epoch(on_steps)
            folder.save(training)
            out.print(_epoch_line(config, result))
    except KeyboardInterrupt:
        folder.write_results(training, interrupted=True)
        done = len(training.history)
        raise _Interrupted(
            f"interrupted after {done} of {config.epochs} epochs; go on with: "
            f"batchnorm train --resume --output {shlex.quote(str(folder.path))}"
        ) from None


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
    norms: Annotated[str, typer.Option(help=f"Comma-separated, of {_names(NORMS)}.")] = ",".join(NORMS),
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
    with _progress(steps, f"{len(chosen)} norms, {seeds} seeds") as on_steps:
        result = run_comparison(configs[0], dataset, chosen, seeds, on_steps)
    write_atomically(
        folder.path / "comparison.json", (json.dumps(result.as_dict(), indent=2) + "\n").encode()
    )
    write_atomically(folder.path / "comparison.png", figures.comparison(result))
    out.print(tables.comparison(result))
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"
    out.print(f"{machine_line()}; {spread}; results in {folder.path}")


@app.command()
def bench(
    shapes: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated, of {_names(SHAPES)}, or shapes such as 32x64x56x56.  "
            "[default: all of them; on a GPU resnet50, there of batch 128]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of the tensors: {_names(benchmark.DTYPES)}.")] = "float32",
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {_names(CASES)}.")] = ",".join(CASES),
    seconds: Annotated[float, typer.Option(help="Time for each shape and case.")] = 1.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: torch's]")] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Time torch.compile too; seconds per shape to compile."),
    ] = False,
    nets: Annotated[
        bool | None, typer.Option(help="Measure whole networks too, on the CPU.  [default: not for a GPU]")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all that was measured.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture, PNG.")] = None,
) -> None:
    """Time the layers beside torch.nn's and a plain copy, in turn, and count what they save for backward."""
    device = _bench_device(device)
    if dtype not in benchmark.DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected one of {_names(benchmark.DTYPES)}")
    on_cpu = device == "cpu"
    if nets is None:
        nets = on_cpu
    if shapes is None:
        shapes = ",".join(SHAPES) if on_cpu else "resnet50"
    pairs = benchmark.pairs(benchmark.parse_cases(cases), benchmark.parse_shapes(shapes, device))
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds {seconds} must be above 0 and finite")
    _check_file("--json", json_file)
    _check_file("--plot", plot)
    if threads is not None:
        _set_threads(threads)
    if compiled and on_cpu and not benchmark.has_cpp_compiler():
        out.print("torch.compile is left out: there is no C++ compiler (CXX, g++ or clang++)")
        compiled = False
    with _progress(len(pairs) + nets, "shapes and cases") as on_steps:
        results = benchmark.bench(
            pairs, seconds, compiled=compiled, device=device, dtype=dtype, on_steps=on_steps
        )
        measured_nets = measure_nets(_NET_SECONDS * seconds) if nets else None
        on_steps(nets)
    out.print(*tables.bench(results, measured_nets), sep="\n")
    if json_file is not None:
        report = benchmark.report(results, seconds)
        report["nets"] = None if measured_nets is None else measured_nets.as_dict()
        write_atomically(json_file, (json.dumps(report, indent=2) + "\n").encode())
    if plot is not None:
        write_atomically(plot, figures.layer_speeds(results))


def _bench_device(device: str) -> str:
    device = resolve_device(device)
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"bench cannot time the device {device!r}: use cpu or cuda")
    return device


def _check_file(option: str, path: Path | None) -> None:
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"{option} {path} cannot be written: give a file in a folder that can be written to")


def _set_threads(threads: int) -> None:
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads {threads} must be from 1 to {MOST_THREADS}")
    torch.set_num_threads(threads)


ModelReference = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="package.module:factory, a function that makes the model."),
]
Weights = Annotated[
    Path | None, typer.Option(help="Its weights: safetensors, or a checkpoint of tensors.  [default: none]")
]
_DATA_HELP = f"{_names(DATASETS)}, or package.module:loader, a function."
Standardize = Annotated[
    bool, typer.Option("--standardize", help="Pixels of a built-in data set with mean 0 and deviation 1.")
]


@app.command()
def recalibrate(
    model: ModelReference,
    data: Annotated[str, typer.Option(help=_DATA_HELP)],
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
    """Replace a model's running statistics by those of the data, and write its weights to a new file."""
    check_new_file("--output", output, references.WEIGHT_FILES)
    net = _load_model(model, weights)
    loader = references.make_loader(data, data_dir=data_dir, batch_size=batch_size, standardize=standardize)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    run_recalibrate(net, loader, max_batches=max_batches, sequential=sequential, progress=out.is_terminal)
    out.print(tables.moved_statistics(net, before))
    write_new_file(output, references.weights_as_bytes(net, output.suffix))
    out.print(f"recalibrated weights in {output}")


@app.command()
def fold(
    model: ModelReference,
    output: Annotated[Path, typer.Option(help=f"New file for the folded model: {_names(WRITERS)}.")],
    weights: Weights = None,
    example: Annotated[
        str | None, typer.Option(help="Shape of an input, such as 1x3x224x224: normal numbers are tried.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=_DATA_HELP)] = None,
    data_dir: DataDir = None,
    standardize: Standardize = False,
) -> None:
    """Fold a model's batch norms into its other layers, check the result, and write it to a new file."""
    check_new_file("--output", output, tuple(WRITERS))
    net = _load_model(model, weights)
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


def _load_model(reference: str, weights: Path | None) -> nn.Module:
    model = references.make_model(reference)
    if weights is not None:
        references.load_weights(model, weights)
    return model


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; whatever is wrong with the input is one line and 2."""
    command = typer.main.get_command(app)
    try:
        code = command(arguments, prog_name="batchnorm", standalone_mode=False) or 0
    except _Interrupted as error:
        return _complain(str(error), INTERRUPTED)
    except (ValueError, OSError) as error:
        return _complain(str(error))
    except Exception as error:
        # typer ships its own copy of click or uses click's, by version: its errors are told by what they do.
        if hasattr(error, "format_message"):
            return _complain(error.format_message())
        raise
    # typer makes a code of Ctrl-C, without a word.
    return _complain("interrupted", code) if code == INTERRUPTED else code


class _Interrupted(Exception):
    """Ctrl-C, with what to do next."""


def _complain(message: str, code: int = 2) -> int:
    print("batchnorm:", " ".join(message.split()), file=sys.stderr)
    return code


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


@contextmanager
def _progress(steps: int, what: str) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task(what, total=steps)
        yield lambda done: progress.advance(task, done)
