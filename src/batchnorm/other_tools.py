"""Tools of others that know torch.nn's fields alone: an error instead of a layer without its options.

They read `running_mean`, and build a layer or weights of their own. Who reads shows in the frame.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx, nn


class _Tool(NamedTuple):
    """Which options a function loses (None: all of them), and what to do instead."""

    loses: tuple[str, ...] | None
    instead: str


_SYNC = _Tool(None, "bn.convert(model, sync=True), or layer.sync = True, synchronises a layer as it is")
_FUSE = _Tool(("activation", "channel_dim"), "bn.fold(model, example) folds batch norms and keeps the rest")
_FREEZE = _Tool(("activation", "channel_dim"), "bn.freeze(model) freezes layers as they are")
_TOOLS = {
    ("torch.nn.modules.batchnorm", "convert_sync_batchnorm"): _SYNC,
    ("torch.nn.utils.fusion", "fuse_conv_bn_eval"): _FUSE,
    ("torch.nn.utils.fusion", "fuse_linear_bn_eval"): _FUSE,
    ("timm.layers.norm_act", "convert_sync_batchnorm"): _SYNC,
    ("timm.layers.norm_act", "freeze_batch_norm_2d"): _FREEZE,
    ("detectron2.layers.batch_norm", "convert_frozen_batchnorm"): _FREEZE,
    ("ultralytics.utils.torch_utils", "fuse_conv_and_bn"): _FUSE,
    ("ultralytics.utils.torch_utils", "fuse_deconv_and_bn"): _FUSE,
}


def check_reader(options: Callable[[str], dict[str, Any]]) -> None:
    """Raise a RuntimeError where the code that reads a layer's statistics would lose its options.

    Args:
        options: those that are lost where a module of this name takes the layer's fields for all there is.
    """
    frame = sys._getframe(2)
    library, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
    tool = _TOOLS.get((library, name))
    if tool is None:
        return
    lost = {k: value for k, value in options(library).items() if tool.loses is None or k in tool.loses}
    if lost:
        said = ", ".join(f"{key}={value!r}" for key, value in lost.items())
        raise RuntimeError(f"{name} would lose {said} of a batch norm: {tool.instead}")


def as_leaf(layer: nn.Module, *args: Any) -> Any:
    """The call of a layer in a graph that torch.fx is tracing, as it is for torch.nn's layers; else None."""
    proxy = next((arg for arg in args if isinstance(arg, fx.Proxy)), None)
    if proxy is None:
        return None
    given = args
    while given and given[-1] is None:
        given = given[:-1]
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), given, {})
