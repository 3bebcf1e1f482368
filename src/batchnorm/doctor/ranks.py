"""Ranks: the processes that diagnose a model together, what they tell each other, and how they fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.doctor.packing import packed, unpacked

Value = TypeVar("Value")

_NAMED = 4


class Ranks:
    """The processes of a group; without a group, this process alone.

    Attributes:
        group: the process group, or None.
        names: the ranks as all processes know them, in the order of the group.
        place: this process's, in that order.
        given: whether there is a group, be it of this process alone.
    """

    def __init__(self, group: Any = None, timeout: timedelta | None = None) -> None:
        several = group is not None and dist.get_world_size(group) > 1
        self.group, self.given = group if several else None, group is not None
        self.names = dist.get_process_group_ranks(group) if several else [0]
        self.place = dist.get_rank(group) if several else 0
        self.timeout = timeout

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.group is None

    def together(self, work: Callable[[], Value], verb: str = "diagnose") -> list[Value]:
        """Call `work`, which may fail in one process; what it returned in each, in the order of the group.

        Raises:
            RuntimeError: it failed in another process, or one did not come; where it failed its own error
                is raised.
        """
        if self.alone:
            return [work()]
        # A process that failed takes part too, with nothing: the others would wait for it for ever.
        error: Exception | None = None
        mine = torch.empty(0, dtype=torch.uint8)
        try:
            mine = packed(work())
        except Exception as caught:
            error = caught
        everyone = self._all_gather(mine, verb)
        if error is not None:
            raise error
        failed = [place for place, theirs in enumerate(everyone) if len(theirs) == 0]
        if failed:
            raise RuntimeError(
                f"{verb}: failed in process {', '.join(map(str, failed))} of the group, see the error there"
            )
        return [unpacked(theirs) for theirs in everyone]

    def _all_gather(self, mine: Tensor, verb: str) -> list[Tensor]:
        try:
            lengths = [int(length) for length in self._all_gather_alike(torch.tensor([len(mine)]))]
            # Tensors of one length are gathered: gloo and NCCL know no other.
            padded = torch.cat([mine, mine.new_zeros(max(lengths) - len(mine))])
            everyone = self._all_gather_alike(padded) if max(lengths) else [padded] * len(lengths)
        except RuntimeError as error:
            raise RuntimeError(
                f"{verb}: the exchange between {said(self.names)} failed on rank {dist.get_rank()}. Has one "
                f"ended, or failed? All processes of the group must call {verb}. The backend says: {error}"
            ) from error
        return [theirs[:length] for theirs, length in zip(everyone, lengths, strict=True)]

    def _all_gather_alike(self, mine: Tensor) -> list[Tensor]:
        mine = mine.to("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
        everyone = [torch.empty_like(mine) for _ in self.names]
        work = dist.all_gather(everyone, mine, group=self.group, async_op=True)
        work.wait() if self.timeout is None else work.wait(self.timeout)
        return [theirs.cpu() for theirs in everyone]


ALONE = Ranks()


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
