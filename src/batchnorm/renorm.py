"""Batch renormalization: a batch's own statistics, corrected towards the running ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from batchnorm.moments import Moments


class Renorm(NamedTuple):
    """How far batch renormalization may correct a batch (Ioffe 2017, algorithm 1).

    `r_max = 1, d_max = 0` is plain batch norm. The paper starts there and, once the running statistics
    mean something (5,000 steps), relaxes to `r_max = 3` by step 40,000 and `d_max = 5` by step 25,000
    (section 4.1); set `layer.renorm` as training goes on to do the same.
    """

    r_max: float = 3.0
    d_max: float = 5.0

    @classmethod
    def parse(cls, value: Renorm | tuple[float, float] | Mapping[str, float] | bool | None) -> Renorm | None:
        """`value` as a Renorm: None or False is off, True the defaults, else (r_max, d_max) or a mapping."""
        if value is None or value is False:
            return None
        try:
            if value is True:
                renorm = cls()
            elif isinstance(value, Mapping):
                renorm = cls(**value)
            else:
                renorm = cls(*value)
            if renorm.r_max >= 1 and renorm.d_max >= 0:
                return renorm
        except TypeError:
            pass
        raise ValueError(
            f"renorm={value!r} is not understood: expected True, None, (r_max, d_max) or "
            "{'r_max': 3.0, 'd_max': 5.0}, with r_max >= 1 and d_max >= 0"
        )

    def correct(
        self,
        scale: Tensor,
        shift: Tensor | None,
        moments: Moments,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift for `((x - mean) / std * r + d) * weight + bias`.

        `r = clip(std / running_std, 1/r_max, r_max)`, `d = clip((mean - running_mean) / running_std,
        -d_max, d_max)`, both constants for the gradient.
        """
        # detach() holds in forward-mode AD too, where no_grad() lets the tangents through.
        mean, var = moments.mean.detach(), moments.var().detach()
        running_std = (running_var.detach().to(scale.dtype) + eps).sqrt()
        r = ((var + eps).sqrt() / running_std).clamp(1 / self.r_max, self.r_max)
        d = ((mean - running_mean.detach()) / running_std).clamp(-self.d_max, self.d_max).to(scale.dtype)
        shift_by_d = d if weight is None else d * weight
        return scale * r, (shift_by_d if shift is None else shift + shift_by_d)
