"""What a number was measured on: the machine and the versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy
import torch

import batchnorm


def machine() -> dict[str, str | int]:
    """System, processor, cores, and the GPU if there is one."""
    described: dict[str, str | int] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "batchnorm": batchnorm.__version__,
    }


def machine_line() -> str:
    """Machine and torch version in one line, to stand under a table."""
    here = machine()
    gpu = f", {here['gpu']}" if "gpu" in here else ""
    return f"{here['processor']}, {here['cores']} cores{gpu}, torch {torch.__version__}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
