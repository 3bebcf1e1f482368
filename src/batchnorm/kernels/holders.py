"""Who holds a gradient that autograd hands to a backward: one that nobody else holds may be written over.

torch's engine adds gradients up in place by the same rule. A backward in Python counts the holders of the
tensor and of its memory, in C++ and in Python. The counts for a gradient that nobody else holds depend on the
versions of torch and Python: they are measured once, and with them whether every kind of holder would show.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

_Counts = tuple[int, int, int, int]

_memory_count = getattr(torch._C, "_storage_Use_Count", None)


def has_no_other_holder(grad_y: Tensor) -> bool:
    """Whether only the caller, the backward that autograd has handed this gradient to, holds it."""
    if type(grad_y) is not Tensor or grad_y.requires_grad or (expected := _without_others()) is None:
        return False
    return _count(grad_y) == expected


def _count(grad_y: Tensor) -> _Counts:
    """Holders of the tensor in C++ and in Python, and of its memory in C++ and in Python."""
    assert _memory_count is not None
    memory = grad_y.untyped_storage()
    in_cpp: int = grad_y._use_count()  # type: ignore[attr-defined]
    return in_cpp, sys.getrefcount(grad_y), _memory_count(memory._cdata), sys.getrefcount(memory)


@cache
def _without_others() -> _Counts | None:
    """The counts of a gradient that only a backward holds; None where another holder would not show."""
    # A thread of its own has no hooks, modes and transforms of others.
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_measure).result()
    except Exception:  # whatever another version of torch may lack; no more threads while Python ends
        return None


def _measure() -> _Counts | None:
    kept: list[Any] = []
    alone = _counts_in(lambda y: y * 2)
    if alone != _counts_in(_handed_on):
        return None
    with_others = [
        _counts_in(lambda y: y * 2, lambda gradient: kept.append(gradient)),
        _counts_in(lambda y: y * 2, lambda gradient: kept.append(gradient.detach())),
        _counts_in(lambda y: y * 2, lambda gradient: kept.append(gradient[:1])),
        _counts_in(lambda y: y * 2, lambda gradient: kept.append(gradient.untyped_storage())),
        _counts_in(lambda y: y),
        _counts_in(lambda y: y * 2, asked_for=True),
    ]
    return None if alone in with_others else alone


def _counts_in(
    follow: Callable[[Tensor], Tensor],
    hook: Callable[[Tensor], None] = lambda gradient: None,
    asked_for: bool = False,
) -> _Counts:
    """The counts of a gradient in a backward, of something that is followed by more.

    Args:
        asked_for: the caller asks for this gradient, too, which torch holds in C++ until the end.
    """
    seen: list[_Counts] = []
    x = torch.ones(2, requires_grad=True)
    y = _Probe.apply(x, seen)
    y.register_hook(hook)
    outcome, gradient = follow(y), torch.ones(2)
    torch.autograd.grad(outcome, [x, y] if asked_for else [x], gradient)
    return seen[0]


def _handed_on(y: Tensor) -> Tensor:
    """Its gradient is what another backward in Python has returned."""
    return _Probe.apply(y, []) * 2


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[_Counts]) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        ctx.seen.append(_seen_from_here(grad_y))
        return grad_y, None


def _seen_from_here(grad_y: Tensor) -> _Counts:
    """As `has_no_other_holder` counts."""
    return _count(grad_y)
