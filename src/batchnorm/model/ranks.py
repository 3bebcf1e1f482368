"""Ranks: the processes that call a verb together, what they tell each other, and how they fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.model.packing import packed, unpacked

Value = TypeVar("Value")

_NAMED = 4
_SHOWN = 300
# Sent at a time, so that a device has no more than this of a batch.
_PIECE = 2**24


class Ranks:
    """The processes of a group; without a group, this process alone.

    Attributes:
        group: the process group, or None.
        verb: what they call, for errors.
        names: the ranks as all processes know them, in the order of the group.
        place: this process's, in that order.
        given: whether there is a group, be it of this process alone.
    """

    def __init__(self, group: Any = None, verb: str = "", timeout: timedelta | None = None) -> None:
        several = group is not None and dist.get_world_size(group) > 1
        self.group, self.given = group if several else None, group is not None
        self.verb, self.timeout = verb, timeout
        self.names = dist.get_process_group_ranks(group) if several else [0]
        self.place = dist.get_rank(group) if several else 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.group is None

    def together(self, work: Callable[[], Value], verb: str | None = None) -> list[Value]:
        """Call `work`, which may fail in one process; what it returned in each, in the order of the group.

        Raises:
            RuntimeError: it failed in another process, or one did not come; where it failed its own error
                is raised.
        """
        if self.alone:
            return [work()]
        verb = verb or self.verb
        # A process that failed takes part too: the others would wait for it for ever.
        error: Exception | None = None
        try:
            mine = packed((None, work()))
        except Exception as caught:
            error, mine = caught, packed((_said_by(caught), None))
        everyone = self._all_gather(mine, verb)
        if error is not None:
            raise error
        answers = [unpacked(theirs) for theirs in everyone]
        failures = {rank: words for rank, (words, _) in zip(self.names, answers, strict=True) if words}
        if failures:
            raise RuntimeError(f"{verb}: failed on {said(list(failures))}: {next(iter(failures.values()))}")
        return [answer for _, answer in answers]

    def from_one(self, place: int, value: Callable[[], Value]) -> Value:
        """In every process, what `value` returns in the one at `place`, where it must not fail.

        Raises:
            RuntimeError: one did not come.
        """
        if self.alone:
            return value()
        if place == self.place:
            own = value()
            self._broadcast(place, packed(own))
            return own
        return unpacked(self._broadcast(place, None))

    def _all_gather(self, mine: Tensor, verb: str) -> list[Tensor]:
        with self._exchange(verb):
            lengths = [int(length) for length in self._all_gather_alike(torch.tensor([len(mine)]))]
            # Tensors of one length are gathered: gloo and NCCL know no other.
            everyone = self._all_gather_alike(torch.cat([mine, mine.new_zeros(max(lengths) - len(mine))]))
        return [theirs[:length] for theirs, length in zip(everyone, lengths, strict=True)]

    def _all_gather_alike(self, mine: Tensor) -> list[Tensor]:
        mine = mine.to(self._device)
        everyone = [torch.empty_like(mine) for _ in self.names]
        self._wait(dist.all_gather(everyone, mine, group=self.group, async_op=True))
        return [theirs.cpu() for theirs in everyone]

    def _broadcast(self, place: int, mine: Tensor | None) -> Tensor:
        """The bytes of the process at `place`, which the others do not know the number of."""
        with self._exchange(self.verb):
            length = int(self._broadcast_alike(place, torch.tensor([0 if mine is None else len(mine)])))
            numbers = torch.empty(length, dtype=torch.uint8) if mine is None else mine
            for piece in numbers.split(_PIECE):
                piece.copy_(self._broadcast_alike(place, piece))
        return numbers

    def _broadcast_alike(self, place: int, numbers: Tensor) -> Tensor:
        numbers = numbers.to(self._device)
        self._wait(dist.broadcast(numbers, self.names[place], group=self.group, async_op=True))
        return numbers.cpu()

    @contextmanager
    def _exchange(self, verb: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{verb}: the exchange between {said(self.names)} failed on rank {dist.get_rank()}. Has one "
                f"ended, or failed? All processes of the group must call {verb}. The backend says: {error}"
            ) from error

    @property
    def _device(self) -> str:
        return "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"

    def _wait(self, work: Any) -> None:
        work.wait() if self.timeout is None else work.wait(self.timeout)


ALONE = Ranks()


def _said_by(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_SHOWN]


def said(ranks: Sequence[int]) -> str:
    """As in `rank 1`, `ranks 0 and 2`, `ranks 0, 1, 2, 3 and 60 more`."""
    names = [str(rank) for rank in ranks[:_NAMED]]
    if len(ranks) > _NAMED:
        names.append(f"{len(ranks) - _NAMED} more")
    if len(names) == 1:
        return f"rank {names[0]}"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def apart(ranks: Sequence[int], what: Sequence[Any]) -> str:
    """Which ranks have something else than the others, as in `rank 1 from ranks 0 and 2`."""
    alike: dict[Any, list[int]] = {}
    for rank, value in zip(ranks, what, strict=True):
        alike.setdefault(value, []).append(rank)
    most, *others = sorted(alike.values(), key=lambda group: (-len(group), group))
    if len(most) == 1 and len(others) > 1:
        return f"each of {said(ranks)} from the others"
    return f"{', '.join(map(said, others))} from {said(most)}"


def first_difference(ranks: Sequence[int], shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> str:
    """Which ranks have tensors of other names or shapes, and the first that is not the first rank's."""
    lists = [tuple(own.items()) for own in shapes]
    other = next(place for place, own in enumerate(lists) if own != lists[0])
    pairs = itertools.zip_longest(lists[0], lists[other])
    first, theirs = next((a, b) for a, b in pairs if a != b)
    return (
        f"{apart(ranks, lists)}: {said(ranks[:1])} has {_tensor(first)} where {said([ranks[other]])} has "
        f"{_tensor(theirs)}"
    )


def _tensor(named: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing more" if named is None else f"{named[0]} of shape {named[1]}"
