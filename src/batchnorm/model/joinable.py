"""Joinable: a process that is out of data goes on taking part, with empty batches, under torch's Join."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, JoinHook
from torch.distributed.algorithms.join import Joinable as TorchJoinable
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.batch_norms import check_model
from batchnorm.model.nested import tensors_in
from batchnorm.names import quoted


class Joinable(nn.Module, TorchJoinable):
    """A model with synchronised layers for `torch.distributed.algorithms.join.Join`.

        model = bn.Joinable(DistributedDataParallel(bn.convert(net, sync=True)))
        with Join([model]):
            for images, labels in loader:  # of another length in each process
                loss = criterion(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    DistributedDataParallel's own joining answers the all-reduces of gradients, but not those of synchronised
    layers, which lie between them. Here a process that has left the loop runs the whole model, forward and
    backward, on a batch without samples whenever another one runs it: the same collectives in the same order,
    and zeros to every sum. At the end all processes get the Parameters and buffers of one that left last;
    what an optimizer remembers stays each process's own. As in any uneven step, gradients are averaged over
    all processes: for those of the mean loss of all samples use `reduction="sum"` and the samples of all.

    Every forward in training must be followed by its one backward, before the next forward. Outside of Join
    it is the model that it wraps.

    Args:
        model: every batch norm in it is synchronised, and every operation takes an empty batch.
        example: arguments (a tuple) of `model`, for a process that may have no batch at all.
        group: the process group, None is the default one.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: a batch norm that is not synchronised, which cannot normalise an empty batch.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...] | None = None, group: Any = None) -> None:
        check_model(model, "Joinable")
        _check_synchronised(model)
        nn.Module.__init__(self)
        TorchJoinable.__init__(self)
        self.model = model
        self.group = dist.group.WORLD if group is None else group
        self._empty: tuple[Any, dict[str, Any]] | None = None if example is None else _emptied((example, {}))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        if self.training and torch.is_grad_enabled():
            self._empty = _emptied((args, kwargs))
            Join.notify_join_context(self)
        return self.model(*args, **kwargs)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a process does that has left the loop."""
        return _EmptyBatches(self)

    @property
    def join_device(self) -> torch.device:
        """Where Join's own numbers are."""
        return next(self.model.parameters()).device

    @property
    def join_process_group(self) -> Any:
        """Whom it joins."""
        return self.group


class _EmptyBatches(JoinHook):
    def __init__(self, joinable: Joinable) -> None:
        self.joinable = joinable

    def main_hook(self) -> None:
        if self.joinable._empty is None:
            raise RuntimeError(
                f"Joinable: rank {dist.get_rank()} has had no batch, and does not know what one looks like: "
                "give Joinable an example"
            )
        args, kwargs = self.joinable._empty
        self.joinable.model.zero_grad()  # DistributedDataParallel would add what is there once more
        outputs = [y for y in tensors_in(self.joinable.model(*args, **kwargs)) if y.requires_grad]
        torch.autograd.backward([y.sum() for y in outputs])

    @torch.no_grad()
    def post_hook(self, is_last_joiner: bool) -> None:
        group, rank = self.joinable.group, dist.get_rank()
        last = torch.tensor([rank if is_last_joiner else -1], device=self.joinable.join_device)
        dist.all_reduce(last, dist.ReduceOp.MAX, group)
        for tensor in [*self.joinable.model.parameters(), *self.joinable.model.buffers()]:
            dist.broadcast(tensor, int(last), group)


def _check_synchronised(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and getattr(layer, "sync", False) is False:
            raise ValueError(
                f"Joinable: {quoted(layer, name)} is not synchronised, and by itself an empty batch has no "
                "statistics: bn.convert(model, sync=True) first, or, where no layer is synchronised, give "
                "Join the DistributedDataParallel model itself"
            )


def _emptied(value: Any) -> Any:
    """The same without samples: every tensor with a first dimension of 0, and no hold on its memory."""
    if isinstance(value, Tensor):
        return value.detach().new_empty((0, *value.shape[1:])) if value.ndim else value.detach()
    if type(value) in (tuple, list):
        return type(value)(_emptied(item) for item in value)
    if isinstance(value, dict):
        return {key: _emptied(item) for key, item in value.items()}
    return value
