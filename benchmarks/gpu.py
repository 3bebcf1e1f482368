"""Every target on the GPU, measured, in one table; or the thresholds of the kernels.

    python benchmarks/gpu.py --data-dir ../shared/data    # writes benchmarks/gpu.txt
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
from batchnorm.lab import crossover, gpu_targets
from batchnorm.lab.machine import machine_line, versions


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crossovers", action="store_true", help="measure the thresholds instead")
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
    if options.crossovers:
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
