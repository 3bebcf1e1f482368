"""Models of other libraries that contain batch norm, by library and by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

from benchmarks.zoo.libraries.entry import Entry, Example

__all__ = ["LIBRARIES", "Entry", "Example"]


def _entries(library: str) -> dict[str, Entry]:
    return importlib.import_module(f"{__name__}.{library}_models").entries()


LIBRARIES: dict[str, Callable[[], dict[str, Entry]]] = {
    library: partial(_entries, library)
    for library in ("timm", "torchvision", "transformers", "smp", "monai", "ultralytics")
}
