"""memory_efficient: layer outputs that the backward pass builds again instead of keeping them."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import torch
from torch import nn

from batchnorm import recipes
from batchnorm.model.batch_norms import Model, check_model

_hooks_enabled = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True)


def memory_efficient(model: Model, enabled: bool = True) -> Model:
    """Let the backward pass of `model` build the outputs of its batch norms again instead of keeping them.

    What a convolution saves of a batch norm with `activation=` before it is one multiply-add and an
    activation away from what that has saved already (Rota Bulò et al. 2018, In-Place Activated BatchNorm,
    section 3; the name is from Pleiss et al. 2017, Memory-Efficient Implementation of DenseNets). A
    rebuilt output is the same to the bit, for any activation. Costs that apply pass once more for each use of
    an output in the backward pass. An output whose residual is itself built again is kept, so that no rebuild
    waits for another: in a residual network that of every second block.

    For this package's layers, in float32 or float64 on the CPU and in half precision too on a GPU; small
    inputs go by the compiled kernels too, inside. All others work as before. Where something else takes care
    of what is saved (activation checkpointing around the model, save_on_cpu, torch.compile) it is left to
    that. As inside any
    `torch.autograd.graph.saved_tensors_hooks`, the model's forward cannot use torch.func.grad, and changes
    made through `.data` go unnoticed.

    Args:
        model: changed in place, by a hook before its forward and one after it; submodules are part of it.
            Its copies and pickles keep it.
        enabled: False takes it off again.

    Returns:
        model

    Raises:
        TypeError: not an nn.Module.
    """
    check_model(model, "memory_efficient")
    hooks = [ours for hook in model._forward_pre_hooks.values() if (ours := _ours(hook)) is not None]
    if enabled and not hooks:
        _Hooks(model)
    elif not enabled:
        for ours in hooks:
            ours.remove()
    return model


def _ours(hook: Any) -> _Hooks | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, _Hooks) else None


class _Hooks:
    """Start a recording before the forward of a model and end it after.

    Their handles are pickled with them: loading those keeps later hooks from being given the same ids.
    """

    def __init__(self, model: nn.Module) -> None:
        self._handles = (
            model.register_forward_pre_hook(self.enter),
            model.register_forward_hook(self.leave, always_call=True),
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def enter(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
            return
        call = sys._getframe(1)
        _end_finished(call)
        if recipes.is_recording() or recipes.others_save() or not _hooks_enabled():
            return
        recording = recipes.Recording()
        recording.__enter__()
        _started.recordings.append((call, recording))

    def leave(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            _end_finished(sys._getframe(1).f_back)


class _Started(threading.local):
    """Recordings of this thread, each with the frame that called the hook before the forward."""

    def __init__(self) -> None:
        self.recordings: list[tuple[FrameType, recipes.Recording]] = []


_started = _Started()


def _end_finished(frame: FrameType | None) -> None:
    """End the recordings of calls that are not running in `frame` or its callers.

    Not simply the last one: a forward that ends by KeyboardInterrupt calls no hook after it, and one whose
    other hooks fail may call only that.
    """
    if not _started.recordings:
        return
    running = set()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    while _started.recordings and not recipes.others_save():
        call, recording = _started.recordings[-1]
        if call in running:
            break
        _started.recordings.pop()
        recording.__exit__(None, None, None)
