"""Whether a folded copy computes what the model computes, in float64 and in its own dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.model.folding import check
from batchnorm.model.folding.apply import carry_out
from batchnorm.model.folding.plan import Plan
from batchnorm.names import quoted

# An example is moved by so much to see how sensitive the model is, and an ordinary model's output by less.
_MOVED, _ORDINARY = 2e-15, 2e-14
_VARIANTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: -x,
    lambda x: 3 * x,
    lambda x: x + x.std(correction=0) * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape),
)


@dataclass(frozen=True)
class Errors:
    """Largest differences from the model in float64, relative to the largest value of each output.

    Attributes:
        copy: of the copy, as it is.
        model: of the model, as it is.
        float64: of a copy in float64.
        allowed: for the latter.
    """

    copy: float
    model: float
    float64: float
    allowed: float


class Pair:
    """A model and a copy of it by a plan, both in float64."""

    def __init__(
        self, source: nn.Module, plan: Plan, arguments: Mapping[str, dict[str, Any]], tolerance: float
    ) -> None:
        self.plan, self.tolerance = plan, tolerance
        self.model = check.to_float64(check.runnable_copy(source))
        self.copied = carry_out(plan, check.to_float64(check.runnable_copy(source)), arguments)

    def compare(self, example: check.Example) -> tuple[Any, float, float]:
        """The output of the model, how far that of the copy is from it, and how far it may be.

        Raises:
            ValueError: it is too far, or one of them does not run; the message names layers.
        """
        wanted = _run_or_say(partial(check.run_float64, self.model, example), "the model", "in float64")
        got = _run_or_say(partial(check.run_float64, self.copied, example), "the folded copy", "in float64")
        error = check.relative_error(wanted, got)
        if error <= self.tolerance:
            return wanted, error, self.tolerance
        error, allowed = self._by_sensitivity(wanted, error, example)
        if not error <= allowed:
            raise ValueError(
                f"fold: model and folded copy differ by {error:.3g} of the largest output in float64, where "
                f"{allowed:.3g} is allowed (tolerance). {self._culprits(example)}"
            )
        return wanted, error, allowed

    def holds_elsewhere(self, example: check.Example) -> bool:
        """Whether both agree on other inputs like the example too, those that the model takes."""
        for vary in _VARIANTS:
            other = tree_map(partial(_varied, vary), example)
            try:
                check.run_float64(self.model, other)
            except ValueError:  # such inputs are not for it
                continue
            try:
                self.compare(other)
            except ValueError:
                return False
        return True

    def _by_sensitivity(self, wanted: Any, error: float, example: check.Example) -> tuple[float, float]:
        """Error and what is allowed, by how much the model's own output moves with its input.

        Where it jumps (the order of detections that are alike), the layers that are folded are compared.
        """
        moved = tree_map(_moved, example)
        noise = check.relative_error(wanted, check.run_float64(self.model, moved))
        if math.isfinite(noise):
            return error, self._allowed(noise)
        return max(
            ((found, self._allowed(noise)) for found, noise in self._layer_by_layer(example, moved).values()),
            key=lambda pair: pair[0] / pair[1],
            default=(error, self.tolerance),
        )

    def _allowed(self, noise: float) -> float:
        return self.tolerance * max(1.0, noise / _ORDINARY)

    def _layer_by_layer(self, example: check.Example, moved: check.Example) -> dict[str, tuple[float, float]]:
        """Of each folded layer: how far its output is from that in the model, and how far that moves."""
        watched = self.plan.watched()
        wanted, got, other = (
            check.outputs_of(one, watched, partial(check.run_float64, one, given))
            for one, given in ((self.model, example), (self.copied, example), (self.model, moved))
        )
        order = [name for name, _ in self.model.named_modules()]
        return {
            name: (
                check.relative_error(wanted[name], got[name]),
                check.relative_error(wanted[name], other[name]),
            )
            for name in sorted(watched, key=order.index)
        }

    def _culprits(self, example: check.Example) -> str:
        found = self._layer_by_layer(example, tree_map(_moved, example))
        differing = [
            quoted(self.model.get_submodule(name), name)
            for name, (error, noise) in found.items()
            if not error <= self._allowed(noise)
        ]
        if not differing:
            return (
                "Every folded layer gives the same, so the forward uses their weights, or what is between "
                "them, in a way that tracing did not see"
            )
        return f"The folded layers whose outputs differ: {', '.join(differing)}"


def errors_of(pair: Pair, folded: nn.Module, unfolded: Any, example: check.Example) -> Errors:
    """How far the copies are from the model.

    Args:
        folded: the copy that is given to the user.
        unfolded: the output of the model as it is.

    Raises:
        ValueError: too far.
    """
    wanted, error, allowed = pair.compare(example)
    as_is = _run_or_say(
        partial(check.run, check.runnable_copy(folded), example), "the folded copy", "on the example"
    )
    return Errors(
        copy=check.relative_error(wanted, as_is, exactly=False),
        model=check.relative_error(wanted, unfolded, exactly=False),
        float64=error,
        allowed=allowed,
    )


def _run_or_say(run: Callable[[], Any], what: str, how: str) -> Any:
    try:
        return run()
    except ValueError as error:
        raise ValueError(f"fold: {what} does not run {how}; it failed {error}") from error


def _moved(value: Any) -> Any:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() * (1 + _MOVED) if is_real else value


def _varied(vary: Callable[[Tensor], Tensor], value: Any) -> Any:
    is_real = isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    return vary(value) if is_real else value
