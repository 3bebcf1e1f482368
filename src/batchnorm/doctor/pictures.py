"""What the page draws of a layer: its running statistics against those of the population."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerPicture:
    """Running and population statistics of a layer, each of shape (C,), float64, on the CPU."""

    layer: str
    running_mean: Tensor
    running_var: Tensor
    population_mean: Tensor | None = None
    population_var: Tensor | None = None
