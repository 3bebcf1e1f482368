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

from torch import Tensor
from torch.autograd.profiler import profile

_LEAST_ROUNDS = 5
_LEAST_SAMPLE_SECONDS = 200e-6
_MOST_CALLS = 100


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
            for leaf in self.leaves:
                leaf.grad = None
        return total / calls


def take_turns(contenders: Mapping[str, Contender], seconds: float) -> dict[str, Timing]:
    """Time each in every round, for so many seconds and at least a few rounds.

    In each round the order is another, so that nobody always finds the cache as the same rival left it.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    with gc_paused():
        calls = {name: _calls_per_sample(contender) for name, contender in contenders.items()}
        end = time.perf_counter() + seconds
        while len(samples[order[0]]) < _LEAST_ROUNDS or time.perf_counter() < end:
            shuffle(order)
            for name in order:
                samples[name].append(contenders[name].seconds(calls[name]))
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


def _calls_per_sample(contender: Contender) -> int:
    contender.seconds(1)  # warm-up
    return min(max(round(_LEAST_SAMPLE_SECONDS / contender.seconds(1)), 1), _MOST_CALLS)
