"""Values as bytes for another process: JSON and the bytes of tensors, so that nothing is unpickled."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Class = TypeVar("Class", bound=type)

_KINDS: dict[str, Any] = {}
_LENGTH = 8


def sent(kind: Class) -> Class:
    """Let instances of a dataclass be packed."""
    _KINDS[kind.__name__] = kind
    return kind


def packed(value: Any) -> Tensor:
    """Numbers, strings, None, lists, tuples, sets, mappings, tensors and `sent` dataclasses, as uint8."""
    raw: list[Tensor] = []
    tree = json.dumps(_tree(value, raw)).encode()
    start = torch.frombuffer(bytearray(len(tree).to_bytes(_LENGTH, "little") + tree), dtype=torch.uint8)
    return torch.cat([start, *raw])


def unpacked(numbers: Tensor) -> Any:
    """What was `packed`."""
    length = int.from_bytes(bytes(numbers[:_LENGTH].tolist()), "little")
    start = _LENGTH + length
    tree = json.loads(numbers[_LENGTH:start].numpy().tobytes())
    return _Reader(numbers[start:]).value(tree)


def comes_back(value: Any) -> bool:
    """Whether a value can be packed and is then what it was: a batch may be an object of any class."""
    if type(value) is Tensor:
        return value.layout == torch.strided and not value.requires_grad and not value.is_quantized
    if type(value) in (list, tuple):
        return all(map(comes_back, value))
    if type(value) is dict:
        return all(type(key) is str and comes_back(inner) for key, inner in value.items())
    return value is None or type(value) in (str, int, float, bool)


def _tree(value: Any, raw: list[Tensor]) -> Any:
    """`value` in JSON's types; the bytes of its tensors go to `raw`."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        raw.append(tensor.flatten().view(torch.uint8))
        return {"tensor": [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]}
    if is_dataclass(value):
        inside = [_tree(getattr(value, field.name), raw) for field in fields(value)]
        return {"kind": [type(value).__name__, inside]}
    if isinstance(value, dict):
        return {"dict": [[key, _tree(inner, raw)] for key, inner in value.items()]}
    if isinstance(value, tuple | set):
        return {type(value).__name__: [_tree(inner, raw) for inner in value]}
    return [_tree(inner, raw) for inner in value] if isinstance(value, list) else value


class _Reader:
    """The tensors, in the order in which they were written."""

    def __init__(self, raw: Tensor) -> None:
        self.raw, self.start = raw, 0

    def value(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.value(inner) for inner in tree]
        if not isinstance(tree, dict):
            return tree
        ((form, inside),) = tree.items()
        if form == "tensor":
            return self.tensor(getattr(torch, inside[0]), inside[1])
        if form == "kind":
            return _KINDS[inside[0]](*self.value(inside[1]))
        if form == "dict":
            return {key: self.value(inner) for key, inner in inside}
        return {"tuple": tuple, "set": set}[form](self.value(inside))

    def tensor(self, dtype: torch.dtype, shape: list[int]) -> Tensor:
        begin, self.start = self.start, self.start + math.prod(shape) * dtype.itemsize
        # A copy begins where its dtype may begin in memory.
        return self.raw[begin : self.start].clone().view(dtype).view(shape)
