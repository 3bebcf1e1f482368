"""How far what a pass gives is from what the pass by batch statistics gives, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from batchnorm.doctor.data.recorder import Pass
from batchnorm.model.packing import sent
from batchnorm.moments import Moments


@sent
@dataclass(frozen=True)
class Differences:
    """Mean squares of differences, which are averaged over batches.

    Attributes:
        outputs: of each batch's outputs.
        by_batch: the moments, over the samples, of the outputs by batch statistics; None without outputs.
        layers: by layer, for each of its calls: of what it gives before its weight and bias, the images'
            means and the std.
    """

    outputs: list[float] = field(default_factory=list)
    by_batch: Moments | None = None
    layers: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, one: Pass, by_batch: Pass) -> Differences:
        """Of two passes over the same batches: of outputs and layers whose shapes are the same in both."""
        layers = {}
        for name, normalized in by_batch.normalized.items():
            pairs = zip(one.normalized.get(name, []), normalized, strict=False)
            layers[name] = [
                float((a - b).square().mean() + (c - d).square().mean())
                for (a, c), (b, d) in pairs
                if a.shape == b.shape
            ]
        outputs = [
            (a, b)
            for a, b in zip(one.outputs, by_batch.outputs, strict=False)
            if a is not None and b is not None and a.shape == b.shape
        ]
        if not outputs:
            return cls(layers=layers)
        width = min(b.shape[1] for _, b in outputs)
        moments = Moments.from_tensor(torch.cat([b[:, :width] for _, b in outputs]))
        return cls([float((a - b).square().mean()) for a, b in outputs], moments, layers)

    @classmethod
    def merge(cls, parts: Iterable[Differences]) -> Differences:
        """Those of all batches."""
        parts = list(parts)
        layers: dict[str, list[float]] = {}
        for part in parts:
            for name, squares in part.layers.items():
                layers.setdefault(name, []).extend(squares)
        known = [part.by_batch for part in parts if part.by_batch is not None]
        return cls([square for part in parts for square in part.outputs], _merged(known), layers)


def _merged(known: list[Moments]) -> Moments | None:
    if not known:
        return None
    width = min(len(moments.mean) for moments in known)
    first, *others = [replace(m, mean=m.mean[:width], m2=m.m2[:width]) for m in known]
    return first.merge(*others)
