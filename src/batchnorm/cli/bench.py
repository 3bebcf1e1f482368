"""`batchnorm bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from batchnorm.cli.app import app, check_writable, names, out, progress_bar
from batchnorm.files import write_atomically
from batchnorm.lab import bench as benchmark
from batchnorm.lab import bench_cases, bench_results, figures, tables
from batchnorm.lab.bench_cases import CASES, DTYPES, SHAPES, parse_cases, parse_shapes
from batchnorm.lab.bench_nets import measure_nets
from batchnorm.lab.recipes import MOST_THREADS, resolve_device

# A step of a network takes longer than a layer's.
_NET_SECONDS = 10


@app.command()
def bench(
    shapes: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated, of {names(SHAPES)}, or shapes such as 32x64x56x56.  "
            "[default: all of them; on a GPU resnet50, there of batch 128]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of the tensors: {names(DTYPES)}.")] = "float32",
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {names(CASES)}.")] = ",".join(CASES),
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
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected one of {names(DTYPES)}")
    on_cpu = device == "cpu"
    if nets is None:
        nets = on_cpu
    if shapes is None:
        shapes = ",".join(SHAPES) if on_cpu else "resnet50"
    pairs = bench_cases.pairs(parse_cases(cases), parse_shapes(shapes, device))
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds {seconds} must be above 0 and finite")
    check_writable("--json", json_file)
    check_writable("--plot", plot)
    if threads is not None:
        _set_threads(threads)
    if compiled and on_cpu and not benchmark.has_cpp_compiler():
        out.print("torch.compile is left out: there is no C++ compiler (CXX, g++ or clang++)")
        compiled = False
    with progress_bar(len(pairs) + nets, "shapes and cases") as on_steps:
        results = benchmark.bench(
            pairs, seconds, compiled=compiled, device=device, dtype=dtype, on_steps=on_steps
        )
        measured_nets = measure_nets(_NET_SECONDS * seconds) if nets else None
        on_steps(nets)
    out.print(*tables.bench(results, measured_nets), sep="\n")
    if json_file is not None:
        report = bench_results.report(results, seconds)
        report["nets"] = None if measured_nets is None else measured_nets.as_dict()
        write_atomically(json_file, (json.dumps(report, indent=2) + "\n").encode())
    if plot is not None:
        write_atomically(plot, figures.layer_speeds(results))


def _bench_device(device: str) -> str:
    device = resolve_device(device)
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"bench cannot time the device {device!r}: use cpu or cuda")
    return device


def _set_threads(threads: int) -> None:
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads {threads} must be from 1 to {MOST_THREADS}")
    torch.set_num_threads(threads)
