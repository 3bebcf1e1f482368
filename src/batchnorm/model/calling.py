"""Calling a model on what a loader yields: the batch taken apart, moved to its device, errors explained."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.names import quoted


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel or DataParallel."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode, without gradients and uncompiled; then in the mode it was in.

    By the flags: `eval()` may be overridden to do something that `train()` does not undo.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad(), uncompiled():
            yield
    finally:
        for module, training in flags:
            module.training = training


def uncompiled() -> AbstractContextManager[None]:
    """Inside, what torch.compile has compiled runs as it was written.

    Compiled code would not call hooks that were not there when it was compiled.
    """
    if "torch._dynamo" not in sys.modules:
        # Nothing is compiled, and importing the compiler takes a second. Imported after a process group was
        # made, it would also keep the group past the end of Python, where gloo's threads may abort.
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def call(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None, verb: str, where: str
) -> Any:
    """`forward(model, batch)`, or the model called on the inputs in `batch`, on the model's device.

    A mapping is `model(**batch)`; a tuple or list `(inputs, ...)` is called on its first element, which may
    itself be a mapping, or a tuple of positional arguments; anything else is `model(batch)`.

    Raises:
        TypeError, ValueError, RuntimeError: the model's own, with the module that failed and what it was
            given.
    """
    moved = to_device(batch, _device(model))
    try:
        if forward is not None:
            return forward(model, moved)
        args, kwargs = _arguments(moved)
        return model(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        if type(error) not in (TypeError, ValueError, RuntimeError):
            raise  # out of memory and the like: not about the batch, and told apart by its class
        hint = "" if forward else ". If the model takes something else, pass forward=lambda model, batch: ..."
        raise type(error)(
            f"{verb}: {_failed_in(model, error.__traceback__)} failed on {where} ({shape_of(batch)}): "
            f"{str(error).strip()}{hint}"
        ) from error


def shape_of(batch: Any) -> str:
    """What a batch is made of, for error messages."""
    if isinstance(batch, Tensor):
        return f"a {str(batch.dtype).removeprefix('torch.')} tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {shape_of(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return f"{type(batch).__name__} of " + (", ".join(map(shape_of, batch)) or "nothing")
    return type(batch).__name__


def to_device(batch: Any, device: torch.device | None) -> Any:
    """`batch` with its tensors on `device`, at any depth of mappings, tuples and lists."""
    if device is None or isinstance(batch, nn.Module):
        return batch
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*[to_device(value, device) for value in batch])
    if isinstance(batch, tuple | list):
        return type(batch)([to_device(value, device) for value in batch])
    return batch


def _device(model: nn.Module) -> torch.device | None:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if tensor is None else tensor.device


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, tuple | list) and not isinstance(batch, nn.utils.rnn.PackedSequence):
        if not batch:
            raise ValueError("an empty batch has no inputs")
        inputs = batch[0]
        if isinstance(inputs, tuple | list) and not isinstance(inputs, nn.utils.rnn.PackedSequence):
            return tuple(inputs), {}
    else:
        inputs = batch
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def _failed_in(model: nn.Module, traceback: TracebackType | None) -> str:
    """The innermost module of `model` that the error came through."""
    names = {id(module): name for name, module in model.named_modules()}
    found = type(model).__name__
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            found = quoted(module, names[id(module)])
        traceback = traceback.tb_next
    return found
