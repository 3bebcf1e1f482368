"""Every target on the GPU, measured, in one table; or the constants of the kernels.

    python benchmarks/gpu.py --data-dir ../shared/data    # writes benchmarks/gpu.txt
    python benchmarks/gpu.py --tiles                      # prints constants for kernels/cuda/plan.py
    python benchmarks/gpu.py --crossovers                 # prints the table of kernels/cuda/thresholds.py

Without a GPU it says what would be measured, and ends with status 2.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

from batchnorm.files import write_atomically
from batchnorm.kernels.cuda.thresholds import KINDS, as_python
from batchnorm.lab import crossover, gpu_targets, tile_sizes
from batchnorm.lab.bench_cases import GPU_SHAPES
from batchnorm.lab.machine import machine_line, versions


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--tiles", action="store_true", help="try sizes of tiles instead")
    instead.add_argument("--crossovers", action="store_true", help="measure the thresholds instead")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape and case")
    parser.add_argument("--data-dir", help="with Fashion-MNIST")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".txt"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("nothing was measured: there is no CUDA GPU here, or this torch is built without CUDA")
        print("expected is an NVIDIA GPU, best an H200, to measure:")
        for target in gpu_targets.expected():
            print(f"- {target}")
        return 2
    print(header())
    if options.tiles:
        try_tiles(options.seconds)
    elif options.crossovers:
        measure_crossovers(options.seconds)
    else:
        measure_targets(options)
    return 0


def measure_targets(options: argparse.Namespace) -> None:
    """Prints the table and writes it."""
    measured = gpu_targets.OnDevice(seconds=options.seconds, data_dir=options.data_dir).measurements()
    lines = list(gpu_targets.lines(measured, lambda part: print(f"measuring: {part}", file=sys.stderr)))
    console = Console(width=160, file=io.StringIO())
    console.print(gpu_targets.table(lines))
    text = console.file.getvalue()
    print(text)
    command = "python benchmarks/gpu.py " + " ".join(sys.argv[1:])
    write_atomically(options.output, f"{header()}\n{command.rstrip()}\n\n{text}".encode())


def try_tiles(seconds: float) -> None:
    """Prints the constants of `plan.py` with which ResNet-50's layers take least."""
    settings = [(dtype, case) for dtype, case, _ in gpu_targets.SETTINGS]
    shapes = GPU_SHAPES["resnet50"]
    chosen = tile_sizes.best(
        lambda: tile_sizes.gpu_seconds(settings, shapes, torch.device("cuda"), seconds / 20),
        lambda values, time: print(f"{time * 1e6:.1f} us with {values}", file=sys.stderr),
    )
    print("for src/batchnorm/kernels/cuda/plan.py:\n")
    for name, value in chosen.items():
        print(f"{name} = {value}")


def measure_crossovers(seconds: float) -> None:
    """Prints the ratios, and the table of thresholds by them."""
    device = torch.device("cuda")
    least, ratios = crossover.crossovers(crossover.gpu_race(device, seconds / 10))
    print("our time over torch's, worst of all tries, by number of values")
    for kind in KINDS:
        of_kind = ", ".join(f"2^{size.bit_length() - 1}: {ratio:.2f}" for size, ratio in ratios[kind].items())
        print(f"{kind}\n    {of_kind}")
    print("\nfor src/batchnorm/kernels/cuda/thresholds.py:\n")
    print(as_python(least))


def header() -> str:
    """Card, driver and versions."""
    found = versions()
    name = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    libraries = ", ".join(f"{library} {version}" for library, version in found.items())
    return (
        f"{name}, {memory:.0f} GiB, driver {driver_version()}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}\n{machine_line()}\n{libraries}, triton {triton_version()}"
    )


def driver_version() -> str:
    """As nvidia-smi says it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    return run.stdout.splitlines()[0].strip() if run.returncode == 0 and run.stdout else "unknown"


def triton_version() -> str:
    """Of the Triton that compiles the kernels."""
    try:
        import triton
    except ImportError:
        return "missing"
    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main())
