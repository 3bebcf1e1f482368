"""What a benchmark times: cases, shapes and dtypes, and how the command line names them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Tensors of the input's size that are alive at once: inputs, gradients, and what all contenders save.
_COPIES = 10

Shape = tuple[int, ...]

# Channels and image size of the batch norms in ResNet-50 for 224 px.
_RESNET50 = (
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28),
    (256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
)  # fmt: skip

_LENET = ((6, 24, 24), (16, 8, 8), (120,), (84,))

SHAPES: dict[str, list[Shape]] = {
    "resnet50": [(batch, channels, size, size) for batch in (8, 32) for channels, size in _RESNET50],
    "lenet": [(batch, *rest) for batch in (4, 16, 128, 1024) for rest in _LENET],
    "mlp": [(256, 120), (4096, 1024)],
    "1d": [(32, 64, 1000)],
    "3d": [(2, 32, 16, 28, 28)],
    "tiny": [(16, 16, 8, 8)],
}

GPU_SHAPES = SHAPES | {"resnet50": [(128, channels, size, size) for channels, size in _RESNET50]}


@dataclass(frozen=True)
class Case:
    """What is timed: always in training mode, with inputs that require gradients."""

    name: str
    backward: bool = True
    activation: str | None = None
    residual: bool = False
    channels_last: bool = False

    def fits(self, shape: Shape) -> bool:
        """Whether inputs of this shape have the case's layout."""
        return not self.channels_last or len(shape) in (4, 5)

    @property
    def tensors(self) -> int:
        """Of the input's size that must be read or written.

        Forward: x, the residual, y. Backward: x, the gradient of y and that of x; with a residual and an
        activation also the output, which tells the slope, and the gradient of the residual.
        """
        return 2 + self.residual + (3 + 2 * self.residual if self.backward else 0)

    def memory_format(self, shape: Shape) -> torch.memory_format:
        """The layout, as torch calls it for this shape."""
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last_3d if len(shape) == 5 else torch.channels_last


CASES = {
    case.name: case
    for case in (
        Case("forward", backward=False),
        Case("forward+backward"),
        Case("forward+backward relu", activation="relu"),
        Case("forward+backward residual relu", activation="relu", residual=True),
        Case("forward+backward channels_last", channels_last=True),
        Case("forward+backward relu channels_last", activation="relu", channels_last=True),
    )
}


def parse_shapes(given: str, device: str = "cpu") -> list[Shape]:
    """Comma-separated names of groups of SHAPES (on a GPU GPU_SHAPES), or shapes as 32x64x56x56; each once.

    Raises:
        ValueError: neither of them, or a shape that batch norm does not take or memory does not hold.
    """
    shapes: list[Shape] = []
    groups = SHAPES if device == "cpu" else GPU_SHAPES
    for word in _words("shapes", given):
        shapes += groups[word] if word in groups else [_parse_shape(word)]
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    for shape in shapes:
        needed = _COPIES * 4 * math.prod(shape)
        if needed > free:
            raise ValueError(
                f"shape {shape_name(shape)} needs about {needed / 2**30:.1f} GiB of memory and "
                f"{free / 2**30:.1f} GiB are free: choose smaller ones with --shapes"
            )
    return list(dict.fromkeys(shapes))


def parse_cases(given: str) -> list[Case]:
    """Comma-separated names of CASES, each once; ValueError for any other name."""
    words = _words("cases", given)
    for word in words:
        if word not in CASES:
            raise ValueError(f"unknown case {word!r}: expected one of {', '.join(CASES)}")
    return [CASES[word] for word in dict.fromkeys(words)]


def pairs(cases: Sequence[Case], shapes: Sequence[Shape]) -> list[tuple[Case, Shape]]:
    """The cases with the shapes that have their layout, case by case; ValueError when there is none."""
    fitting = [(case, shape) for case in cases for shape in shapes if case.fits(shape)]
    if not fitting:
        raise ValueError("nothing to time: channels_last needs a 4D or 5D shape")
    return fitting


def shape_name(shape: Shape) -> str:
    """As the command line takes it: 32x64x56x56."""
    return "x".join(map(str, shape))


def _words(what: str, given: str) -> list[str]:
    words = [word.strip() for word in given.split(",") if word.strip()]
    if not words:
        raise ValueError(f"--{what} is empty: give one or more, comma-separated")
    return words


def _parse_shape(word: str) -> Shape:
    parts = word.split("x")
    if not 2 <= len(parts) <= 5 or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise ValueError(
            f"unknown shape {word!r}: expected one of {', '.join(SHAPES)}, "
            "or 2 to 5 sizes such as 32x64x56x56"
        )
    shape = tuple(map(int, parts))
    if min(shape) < 1 or math.prod(shape) <= shape[1]:
        raise ValueError(
            f"shape {word} has no more than one value per channel: batch norm needs its variance"
        )
    return shape
