"""How the benchmarks measure: contenders timed in turn, and bytes that a result keeps alive."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

LEAST_ROUNDS = 9
_LEAST_SAMPLE_SECONDS = 200e-6
_MOST_CALLS = 100
# Writing them takes a GPU of today some 300 microseconds, in which a call is launched from Python.
_LEAST_FLUSHED_BYTES = 2**30


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of `rounds` samples, in milliseconds."""

    ms: float
    spread_ms: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Of two samples or more."""
        first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median * 1e3, (third - first) * 1e3, len(seconds))


@dataclass(frozen=True)
class Contender:
    """A call to time, and the tensors whose gradients it leaves behind."""

    call: Callable[[], Any]
    leaves: Sequence[Tensor] = ()

    def seconds(self, calls: int) -> float:
        """Mean time of so many calls; gradients and results are freed while the clock stands still."""
        total = 0.0
        for _ in range(calls):
            start = time.perf_counter()
            kept = self.call()
            total += time.perf_counter() - start
            del kept
            self.forget()
        return total / calls

    @classmethod
    def training(
        cls, layer: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor | None
    ) -> Contender:
        """A layer's forward, with its backward where there is a gradient of the output."""

        def step() -> Tensor:
            y = layer(*inputs)
            y.backward(gradient)
            return y

        parameters = layer.parameters() if isinstance(layer, nn.Module) else ()
        return cls((lambda: layer(*inputs)) if gradient is None else step, [*inputs, *parameters])

    def forget(self) -> None:
        """Free the gradients."""
        for leaf in self.leaves:
            leaf.grad = None


class DeviceClock:
    """Times calls on a GPU by its own events; before each call other memory is written, as large as the
    second-level cache and more, so that no input is found there.

    The device works through the writing while the call is launched: only what a call takes to launch beyond
    that is in its time.
    """

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._other_memory = torch.empty(
            max(4 * cache, _LEAST_FLUSHED_BYTES), dtype=torch.uint8, device=device
        )

    def __call__(self, contender: Contender, calls: int) -> float:
        """Mean time of so many calls in seconds."""
        spans = []
        for _ in range(calls):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._other_memory.zero_()
            start.record()
            kept = contender.call()
            end.record()
            spans.append((start, end))
            del kept
            contender.forget()
        torch.cuda.synchronize(self._other_memory.device)
        return sum(start.elapsed_time(end) for start, end in spans) / calls / 1e3


def take_turns(
    contenders: Mapping[str, Contender],
    seconds: float,
    clock: Callable[[Contender, int], float] = Contender.seconds,
) -> dict[str, Timing]:
    """Time each in every round, for so many seconds and at least a few rounds.

    In each round the order is another, so that nobody always finds the cache as the same rival left it.
    `clock` says how long so many calls of a contender take, each.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    with gc_paused():
        calls = {name: _calls_per_sample(contender, clock) for name, contender in contenders.items()}
        end = time.perf_counter() + seconds
        while len(samples[order[0]]) < LEAST_ROUNDS or time.perf_counter() < end:
            shuffle(order)
            for name in order:
                samples[name].append(clock(contenders[name], calls[name]))
    return {name: Timing.of(of_contender) for name, of_contender in samples.items()}


@contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection inside; afterwards as before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def held_bytes(make: Callable[[], Any]) -> int:
    """Bytes of tensor memory that the result of `make()` keeps alive, by torch's own record of its allocator.

    Counts what was allocated in `make()` and is not free when it returns, whoever holds it: autograd's
    nodes, Python, C++. What `make()` leaves in reference cycles is freed first.
    """
    make()  # what is allocated once, such as workspaces, is not the result's
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes lines on stderr
    with gc_paused():
        gc.collect(0)
        with profile(profile_memory=True) as record:
            kept = make()
            gc.collect(0)  # all that is new is in the youngest generation: garbage collection is paused
    assert record.function_events is not None
    del kept
    return sum(event.self_cpu_memory_usage for event in record.function_events)


def held_device_bytes(make: Callable[[], Any], device: torch.device) -> int:
    """As `held_bytes`, of a GPU's memory: in blocks of 512 bytes, as torch hands it out."""
    make()
    with gc_paused():
        gc.collect(0)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        kept = make()
        gc.collect(0)
        held: int = torch.cuda.memory_allocated(device) - before
    del kept
    return held


def _calls_per_sample(contender: Contender, clock: Callable[[Contender, int], float]) -> int:
    clock(contender, 1)  # warm-up
    return min(max(round(_LEAST_SAMPLE_SECONDS / clock(contender, 1)), 1), _MOST_CALLS)
