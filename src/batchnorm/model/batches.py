"""Batches: those of a loader, as many as asked for, with a progress bar."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


class Batches:
    """The batches of a loader, no more than `max_batches`, counted and perhaps with a progress bar."""

    def __init__(self, loader: Any, max_batches: int | None, progress: bool, again: bool, verb: str) -> None:
        if max_batches is not None and (type(max_batches) is not int or max_batches < 1):
            raise ValueError(
                f"{verb}: max_batches={max_batches!r} must be a whole number, 1 or more, or None"
            )
        if isinstance(loader, Tensor | str | dict | nn.Module) or not hasattr(loader, "__iter__"):
            raise TypeError(
                f"{verb}: expected an iterable of batches such as a DataLoader, got "
                f"{type(loader).__name__}: a single batch goes in a list, [batch]"
            )
        if again and hasattr(loader, "__next__"):
            raise TypeError(
                f"{verb}: sequential=True goes over the loader once per layer, but "
                f"{type(loader).__name__} can be iterated only once: give a DataLoader or a list"
            )
        self.loader, self.max_batches = loader, max_batches
        self.verb = verb
        self.bar = tqdm_bar(verb) if progress else None

    def __iter__(self) -> Iterator[Any]:
        batches = itertools.islice(self.loader, self.max_batches)
        if self.bar is None:
            return batches
        return iter(self.bar(batches, desc=self.verb, unit="batch", total=self._total()))

    def _total(self) -> int | None:
        try:
            batches = len(self.loader)
        except TypeError:
            return self.max_batches
        return batches if self.max_batches is None else min(batches, self.max_batches)


def tqdm_bar(verb: str) -> Callable[..., Any]:
    """tqdm's bar; ModuleNotFoundError without it."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{verb}: progress=True draws its bar with tqdm: pip install tqdm", name="tqdm"
        ) from error
    return tqdm
