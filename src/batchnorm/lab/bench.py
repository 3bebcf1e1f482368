"""Speed and memory of the layers beside torch.nn's, torch.compile's and a plain copy, on a CPU or a GPU."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.lab import peers as peering
from batchnorm.lab.bench_cases import DTYPES, Case, Shape
from batchnorm.lab.bench_probes import (
    Contender,
    DeviceClock,
    held_bytes,
    held_device_bytes,
    take_turns,
)
from batchnorm.lab.bench_results import COMPILED, FLOOR, OURS, TORCH, TORCH_OTHER_LAYOUT, Result
from batchnorm.lab.peers import PEERS, Peer

_CPU = torch.device("cpu")


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
