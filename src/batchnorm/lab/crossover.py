"""From how many values on our kernels are as fast as torch's operators on a GPU, for `thresholds.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from batchnorm.kernels.cuda.thresholds import KINDS, Kind, everywhere
from batchnorm.lab.bench import data, layers
from batchnorm.lab.bench_cases import Case, Shape
from batchnorm.lab.bench_probes import Contender, DeviceClock, take_turns
from batchnorm.lab.bench_results import OURS, TORCH

# How much more of torch's time is borne, channels that are tried, and how many values.
LOSS, CHANNELS = 1.02, (64, 512)
SIZES = tuple(1 << power for power in range(15, 28))
_POSITIONS = (8, 8)

Race = Callable[[Kind, Shape], float]
"""Our time over torch's, for a kind of call and a shape."""

Clock = Callable[[Contender, int], float]


class WallClock:
    """Times calls that follow each other, by the host: where they take longer to launch than to run, that."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, contender: Contender, calls: int) -> float:
        """Mean time of some calls in seconds."""
        calls *= 10
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(calls):
            contender.call()
            contender.forget()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / calls


def gpu_race(device: torch.device, seconds: float, forced: bool = True) -> Race:
    """Our time over torch's: the worse of the GPU's own time, and of calls that follow each other."""
    clocks = DeviceClock(device), WallClock(device)
    return lambda kind, shape: max(race(kind, shape, device, seconds, clock, forced) for clock in clocks)


def race(
    kind: Kind, shape: Shape, device: torch.device, seconds: float, clock: Clock, forced: bool = True
) -> float:
    """Our time over torch's by this clock: the worst that a call of this kind gives.

    With our kernels whatever the thresholds are, where `forced`, else as the layers choose.
    """
    ratios = []
    for case in cases(kind):
        inputs, gradient = data(case, shape, device, torch.bfloat16 if kind.half else torch.float32)
        contenders = {
            name: _contender(layer, kind, inputs, gradient)
            for name, layer in zip((TORCH, OURS), layers(case, shape, device), strict=True)
        }
        with everywhere() if forced else nullcontext():
            timings = take_turns(contenders, seconds, clock)
        ratios.append(timings[OURS].ms / timings[TORCH].ms)
    return max(ratios)


def cases(kind: Kind) -> list[Case]:
    """Calls of this kind."""
    if not kind.fused:
        return [Case("alone", kind.training, channels_last=kind.rows)]
    return [
        Case("relu", kind.training, "relu", residual, channels_last=kind.rows) for residual in (False, True)
    ]


def crossovers(
    race: Race,
    sizes: Sequence[int] = SIZES,
    channels: Sequence[int] = CHANNELS,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> tuple[dict[Kind, int | None], dict[Kind, dict[int, float]]]:
    """The least values for each kind, and the worst ratio by number of values."""
    ratios: dict[Kind, dict[int, float]] = {}
    for kind in KINDS:
        ratios[kind] = {}
        for size in sizes:
            ratios[kind][size] = max(race(kind, shape) for shape in _shapes(size, channels))
            on_steps(1)
    return {kind: least_from(of_kind) for kind, of_kind in ratios.items()}, ratios


def least_from(ratios: Mapping[int, float]) -> int | None:
    """The number of values from which on no ratio is above LOSS; None where the largest one's is."""
    least = None
    for size in sorted(ratios, reverse=True):
        if not ratios[size] <= LOSS:
            break
        least = size
    return least


def _shapes(size: int, channels: Sequence[int]) -> Iterator[Shape]:
    height, width = _POSITIONS
    for number in channels:
        yield (max(size // (number * height * width), 1), number, height, width)


def _contender(
    layer: Callable[..., Tensor], kind: Kind, inputs: list[Tensor], gradient: Tensor | None
) -> Contender:
    if kind.training:
        return Contender.training(layer, inputs, gradient)
    assert isinstance(layer, nn.Module)
    layer.eval()

    def infer() -> Tensor:
        with torch.inference_mode():
            return layer(*inputs)

    return Contender(infer)
