"""What the cases of a set of processes have in common: who runs them, and how results are compared."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

C = 5
# Samples on each process: even, uneven, none.
SPLITS: dict[int, list[list[int]]] = {
    2: [[4, 4], [5, 2], [1, 6], [0, 6]],
    3: [[2, 2, 2], [4, 1, 3], [0, 7, 0]],
    4: [[2, 2, 2, 2], [3, 0, 1, 5]],
}
Function = Callable[[], None]
# Each with the sizes of the sets of processes that run it.
Cases = dict[str, tuple[Function, tuple[int, ...]]]


def registering(cases: Cases) -> Callable[..., Callable[[Function], Function]]:
    """A decorator that registers a case for sets of so many processes."""

    def case(*on: int) -> Callable[[Function], Function]:
        def register(function: Function) -> Function:
            cases[function.__name__] = function, on
            return function

        return register

    return case


CASES: Cases = {}
case = registering(CASES)

# Set by `run`: groups of this process alone, and of the first two.
ALONE: Any = None
PAIR: Any = None

# Largest error found by the case that is running, relative to the largest value; for the log.
worst = 0.0


@torch.no_grad()
def assert_near(got: Tensor, wanted: Tensor, rtol: float, what: str) -> None:
    """Errors are relative to the largest value: a sum's rounding is as large as its largest term's."""
    global worst
    assert got.shape == wanted.shape, f"{what}: {got.shape} instead of {wanted.shape}"
    if wanted.numel() == 0:
        return
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)
    worst = max(worst, float(error))
    assert float(error) <= rtol, f"{what}: relative error {float(error):.2e}, not within {rtol:.0e}"


def parts(x: Tensor, sizes: list[int]) -> Tensor:
    """This process's samples of the whole batch."""
    return x.split(sizes)[dist.get_rank()].detach().clone()


def parameters_of(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)


COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor",
    "reduce_scatter", "broadcast", "broadcast_object_list", "gather", "scatter", "barrier", "send", "recv",
    "reduce",
)  # fmt: skip


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[torch.dtype, int]]]:
    """The dtype and bytes of every all-reduce inside; any other collective fails."""
    calls: list[tuple[torch.dtype, int]] = []
    real = {name: getattr(dist, name) for name in COLLECTIVES}

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((tensor.dtype, tensor.numel() * tensor.element_size()))
        return real["all_reduce"](tensor, *args, **options)

    def other(*args: Any, **options: Any) -> Any:
        raise AssertionError("a collective that is not an all-reduce")

    try:
        for name in COLLECTIVES:
            setattr(dist, name, all_reduce if name == "all_reduce" else other)
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
