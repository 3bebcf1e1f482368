"""The operators torchvision needs at import, for an installation whose compiled ones do not load."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # the operators live as long as this object


def define() -> None:
    """Make torchvision importable; nothing is done where it is absent or has its own operators."""
    global _library
    if _library is not None or "torchvision" in sys.modules or _compiled_load():
        return
    if hasattr(torch.ops.torchvision, "nms") or importlib.util.find_spec("torchvision") is None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _library.define(f"{name}{_SIGNATURE}")
    _library.impl("nms", _nms, "CPU")
    _library.impl("nms", _nms, "CUDA")
    _let_torchvision_use_them()


def _let_torchvision_use_them() -> None:
    boxes = importlib.import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None  # what nms asks before it calls the operator
    roi_align = importlib.import_module("torchvision.ops.roi_align")
    # Its version without an operator compiles itself at the first call, which takes longer than the model.
    roi_align._roi_align = getattr(roi_align._roi_align, "__wrapped__", roi_align._roi_align)


def _compiled_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    folders = (spec.submodule_search_locations if spec else None) or []
    for path in (path for folder in folders for path in Path(folder).glob("_C*")):
        try:
            torch.ops.load_library(str(path))
            return True
        except OSError:
            continue
    return False


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The indices of the boxes that overlap no box of a higher score that is kept, the highest first."""
    order = scores.argsort(descending=True, stable=True)
    overlaps = (_iou(boxes[order]) > iou_threshold).cpu()
    kept = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if kept[i]:
            kept[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[kept.to(order.device)]


def _iou(boxes: Tensor) -> Tensor:
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return shared / (area[:, None] + area[None, :] - shared)
