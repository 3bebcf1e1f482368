"""Speed and memory of the layers beside torch.nn's, torch.compile's and a plain copy, on a CPU or a GPU."""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.lab import peers as peering
from batchnorm.lab.bench_probes import (
    Contender,
    DeviceClock,
    Timing,
    held_bytes,
    held_device_bytes,
    take_turns,
)
from batchnorm.lab.machine import machine, versions
from batchnorm.lab.peers import PEERS, Peer

TORCH, COMPILED, OURS, FLOOR = "torch.nn", "torch.compile", "batchnorm", "floor"
# On a GPU, where it is the layout that decides which of torch's kernels runs.
TORCH_OTHER_LAYOUT = "torch.nn, other layout"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Summaries: mean speed over shapes of so many elements, mean distance to the floor over shapes of so many.
LARGE, HUGE = 50_000, 1_000_000

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
_CPU = torch.device("cpu")


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


@dataclass(frozen=True)
class Result:
    """What one case gave for one shape; `notes` say why contenders are missing."""

    case: str
    shape: Shape
    timings: dict[str, Timing]
    saved_bytes: dict[str, int]
    notes: tuple[str, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def elements(self) -> int:
        """Of the input."""
        return math.prod(self.shape)

    @property
    def speedup(self) -> float:
        """torch.nn's time over ours: above 1 ours is faster."""
        return self.timings[TORCH].ms / self.timings[OURS].ms

    @property
    def over_floor(self) -> float:
        """Our time over the plain copy's."""
        return self.timings[OURS].ms / self.timings[FLOOR].ms

    @property
    def bandwidth(self) -> float:
        """GB/s (1e9 bytes) at which we move what any batch norm has to: each tensor once per pass."""
        return self._bytes(CASES[self.case].tensors) / self.timings[OURS].ms / 1e6

    @property
    def copy_bandwidth(self) -> float:
        """GB/s of the plain copies."""
        return self._bytes(5 if CASES[self.case].backward else 2) / self.timings[FLOOR].ms / 1e6

    def _bytes(self, tensors: int) -> int:
        return tensors * self.elements * DTYPES[self.dtype].itemsize

    @property
    def saved_ratio(self) -> float:
        """Bytes that we save for backward over those of torch.nn."""
        return self.saved_bytes[OURS] / self.saved_bytes[TORCH]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with layout and ratios."""
        return {
            **asdict(self),
            "layout": "channels_last" if CASES[self.case].channels_last else "contiguous",
            "speedup": self.speedup,
            "over_floor": self.over_floor,
            "saved_ratio": self.saved_ratio,
            "gigabytes_per_second": self.bandwidth,
            "copy_gigabytes_per_second": self.copy_bandwidth,
        }


@dataclass(frozen=True)
class Summary:
    """Geometric mean of a ratio over the `shapes` that are large enough, None without any; and the worst."""

    mean: float | None
    shapes: int
    worst: float
    worst_shape: Shape


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


def has_cpp_compiler() -> bool:
    """Whether there is a C++ compiler for torch.compile."""
    candidates = (os.environ.get("CXX"), "g++", "clang++")
    return any(shutil.which(candidate) for candidate in candidates if candidate)


def bench(
    pairs: Sequence[tuple[Case, Shape]],
    seconds: float,
    *,
    compiled: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    on_steps: Callable[[int], None] = lambda steps: None,
) -> list[Result]:
    """Measure each case with its shape.

    Args:
        pairs: from `pairs()`.
        seconds: to time each for; the large ones get a few rounds, whatever they take.
        compiled: time torch.nn's layers through torch.compile too, which takes seconds each to compile.
        device: "cpu", or a GPU such as "cuda".
        dtype: of DTYPES, that of the tensors; weights, biases and statistics are float32.
        on_steps: told after each that 1 more is done.

    On a GPU the PEERS that are installed are timed too.
    """
    peers = () if device == "cpu" else PEERS
    results = []
    for case, shape in pairs:
        results.append(
            measure(case, shape, seconds, compiled=compiled, device=device, dtype=dtype, peers=peers)
        )
        on_steps(1)
    return results


def measure(
    case: Case,
    shape: Shape,
    seconds: float,
    *,
    compiled: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    peers: Sequence[Peer] = (),
) -> Result:
    """Time all contenders in turn for so many seconds, and count the bytes they save for backward."""
    place = torch.device(device)
    theirs, ours = layers(case, shape, place)
    inputs, gradient = data(case, shape, place, DTYPES[dtype])
    contenders = {
        TORCH: Contender.training(theirs, inputs, gradient),
        OURS: Contender.training(ours, inputs, gradient),
        FLOOR: _floor(inputs[0], gradient),
    }
    other = replace(case, channels_last=not case.channels_last)
    if place.type != "cpu" and len(shape) in (4, 5):
        contenders[TORCH_OTHER_LAYOUT] = Contender.training(theirs, *data(other, shape, place, DTYPES[dtype]))
    with warnings.catch_warnings():
        notes = []
        if compiled or peers:
            warnings.simplefilter("ignore")
        if compiled:
            contender, note = _compiled(case, shape, inputs, gradient)
            if contender is not None:
                contenders[COMPILED] = contender
            if note is not None:
                notes.append(note)
        others, failures = peering.contenders(case, shape, inputs, gradient, theirs, peers)
        contenders |= others
        notes += failures
        clock = Contender.seconds if place.type == "cpu" else DeviceClock(place)
        timings = take_turns(contenders, seconds, clock)
    saved = {
        name: _saved_bytes(layer, case, shape, place, DTYPES[dtype])
        for name, layer in ((TORCH, theirs), (OURS, ours))
    }
    return Result(case.name, shape, timings, saved, tuple(notes), dtype, place.type)


def speedups(results: Sequence[Result]) -> dict[str, Summary]:
    """By case: mean of torch.nn's time over ours for the LARGE shapes, and the worst of all shapes."""
    summaries = {}
    for case in dict.fromkeys(result.case for result in results):
        of_case = [result for result in results if result.case == case]
        worst = min(of_case, key=lambda result: result.speedup)
        mean, count = _mean([result.speedup for result in of_case if result.elements >= LARGE])
        summaries[case] = Summary(mean, count, worst.speedup, worst.shape)
    return summaries


def over_floor(results: Sequence[Result]) -> Summary | None:
    """Mean and worst of our time over the floor's, of plain forward+backward for the HUGE shapes, if any."""
    huge = [result for result in results if result.case == "forward+backward" and result.elements >= HUGE]
    if not huge:
        return None
    worst = max(huge, key=lambda result: result.over_floor)
    mean, count = _mean([result.over_floor for result in huge])
    return Summary(mean, count, worst.over_floor, worst.shape)


def means_on_gpu(results: Sequence[Result]) -> dict[str, tuple[float, float | None]]:
    """By case, geometric means: our share of the copies' bandwidth, and torch.compile's time over ours."""
    means = {}
    for case in dict.fromkeys(result.case for result in results):
        of_case = [result for result in results if result.case == case]
        share = statistics.geometric_mean(result.bandwidth / result.copy_bandwidth for result in of_case)
        timings = [result.timings for result in of_case if COMPILED in result.timings]
        compiled, _ = _mean([timing[COMPILED].ms / timing[OURS].ms for timing in timings])
        means[case] = share, compiled
    return means


def report(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Plain values of all of it, with machine and versions."""
    floor = over_floor(results)
    return {
        "results": [result.as_dict() for result in results],
        "speedups": {case: asdict(summary) for case, summary in speedups(results).items()},
        "over_floor": None if floor is None else asdict(floor),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "machine": machine(),
    }


def _mean(ratios: list[float]) -> tuple[float | None, int]:
    return (statistics.geometric_mean(ratios) if ratios else None), len(ratios)


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


def layers(
    case: Case, shape: Shape, device: torch.device = _CPU
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """torch.nn's layer, with what follows it, and ours."""
    name = f"BatchNorm{max(len(shape) - 2, 1)}d"
    ours = getattr(batchnorm, name)(shape[1], activation=case.activation, device=device)
    return _torch_layer(case, getattr(nn, name)(shape[1], device=device)), ours


def _torch_layer(case: Case, norm: nn.Module) -> Callable[..., Tensor]:
    if case.residual:
        return _ResidualReLU(norm)
    return norm if case.activation is None else nn.Sequential(norm, nn.ReLU())


class _ResidualReLU(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(self.norm(x) + residual)


def data(
    case: Case, shape: Shape, device: torch.device = _CPU, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor | None]:
    """Input, residual where the case has one, and the gradient of the output where it has one."""
    generator = torch.Generator(device).manual_seed(0)
    layout = case.memory_format(shape)

    def normal() -> Tensor:
        x = torch.empty(shape, memory_format=layout, dtype=dtype, device=device)
        return x.normal_(generator=generator)

    inputs = [normal().requires_grad_() for _ in range(1 + case.residual)]
    return inputs, normal() if case.backward else None


def _floor(x: Tensor, gradient: Tensor | None) -> Contender:
    x = x.detach()
    return Contender(x.clone if gradient is None else lambda: (x.clone(), x + gradient))


def _compiled(
    case: Case, shape: Shape, inputs: list[Tensor], gradient: Tensor | None
) -> tuple[Contender | None, str | None]:
    """torch.nn's layer through torch.compile, compiled by a first call; or None and why not."""
    try:
        torch.compiler.reset()  # each shape from scratch, so that no limit on recompiling is reached
        contender = Contender.training(
            torch.compile(layers(case, shape, inputs[0].device)[0]), inputs, gradient
        )
        contender.call()
        contender.forget()
        return contender, None
    except Exception as error:  # whatever the compiler, or the lack of one, may raise
        return (
            None,
            f"torch.compile failed: {(str(error).strip() or type(error).__name__).splitlines()[0][:100]}",
        )


def _saved_bytes(
    layer: Callable[..., Tensor], case: Case, shape: Shape, device: torch.device, dtype: torch.dtype
) -> int:
    """Of one layer, its input included where the layer keeps it."""
    source = torch.zeros(1, requires_grad=True, device=device, dtype=dtype)

    def forward() -> Any:
        # Copies, for which autograd keeps nothing: they live on only if the layer holds them.
        copies = [
            source.expand(shape).clone(memory_format=case.memory_format(shape))
            for _ in range(1 + case.residual)
        ]
        return layer(*copies).grad_fn

    return held_bytes(forward) if device.type == "cpu" else held_device_bytes(forward, device)
