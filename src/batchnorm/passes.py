"""The passes over memory of a synchronised layer: by the halves of a kernel, or in torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.checks import statistics_dtype
from batchnorm.distributed import Processes
from batchnorm.kernels import reference
from batchnorm.moments import Moments, take


class Call(NamedTuple):
    """What a normalisation needs besides tensors.

    Attributes:
        kernel: whose halves do what is between the all-reduces; None: torch's operations do.
        activation, slope_from: as those of `autograd.Call`; what is not applied by a kernel is left out.
    """

    processes: Processes
    kernel: ModuleType | None
    eps: float
    channel_dim: int
    activation: str | None
    slope_from: str
    correction: Callable[[Moments], tuple[Tensor, Tensor] | None]


def statistics(x: Tensor, mask: Tensor | None, call: Call) -> Moments:
    """The moments of this process's batch."""
    if call.kernel is None:
        return take(x, tuple(dim for dim in range(x.ndim) if dim != call.channel_dim), mask)
    moments: Moments = call.kernel.statistics(x, channel_dim=call.channel_dim)
    return moments


def apply(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor | None, channel_dim: int) -> Tensor:
    """`(x - mean) * scale + shift`, in the dtype and memory layout of `x`; not differentiable."""
    centred, rest = _centre(x, mean, channel_dim)
    shift = -rest * scale if shift is None else shift - rest * scale
    return (
        centred.mul_(_along(scale, centred, channel_dim))
        .add_(_along(shift, centred, channel_dim))
        .to(x.dtype)
    )


def _centre(x: Tensor, mean: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """`x` less its rounded mean, and per channel what the rounding has left of the mean.

    Without that rest, a float32 output is wrong by up to 6e-8 * |mean| / std.
    """
    values = x.to(statistics_dtype(x))
    rounded = mean.to(values.dtype)
    return values - _along(rounded, values, channel_dim), mean - rounded


def _along(values: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    shape = [1] * x.ndim
    shape[channel_dim] = -1
    return values.to(x.dtype).view(shape)


class ByKernel:
    """The passes of a backward over memory, by the halves of a kernel."""

    def __init__(
        self, call: Call, grad_y: Tensor, x: Tensor, extra: Tensor | None, mean: Tensor, table: Tensor
    ) -> None:
        self.call, self.grad_y, self.x, self.extra, self.table = call, grad_y, x, extra, table
        # What rounding has left of the mean, in the kernels and here.
        self.rest = mean - mean.to(statistics_dtype(x))
        self.kept: Tensor | None = None

    def sums(self) -> Tensor:
        """`sum(g)` and `sum(g * (x - rounded mean))` by channel, for g the gradient before the activation."""
        call = self.call
        assert call.kernel is not None
        sums: Tensor
        sums, self.kept = call.kernel.backward_sums(
            self.grad_y,
            self.x,
            self.table,
            channel_dim=call.channel_dim,
            activation=call.activation,
            slope_from=call.slope_from,
            extra=self.extra,
        )
        return sums

    def grad_residual(self) -> Tensor | None:
        """g itself."""
        return self.grad_y if self.call.activation is None else self.kept

    def grad_x(self, slope: Tensor, constant: Tensor, wants_residual: bool) -> Tensor:
        """`g * scale + (x - rounded mean) * slope + constant`."""
        call = self.call
        assert call.kernel is not None
        apply = partial(call.kernel.backward_apply, channel_dim=call.channel_dim)
        coefficients = torch.stack([slope, constant])
        found: Tensor
        if self.kept is None:
            found = apply(self.grad_y, self.x, self.table, coefficients, activation=call.activation)
        else:
            out = None if wants_residual else self.kept
            found = apply(self.kept, self.x, self.table, coefficients, out=out)
        return found


class ByTorch:
    """The same in torch's operations, which are differentiable once more."""

    def __init__(
        self,
        call: Call,
        grad_y: Tensor | None,
        x: Tensor,
        extra: Tensor | None,
        mask: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        bias: Tensor | None,
    ) -> None:
        self.channel_dim, self.mask, self.dtype = call.channel_dim, mask, x.dtype
        self.centred, self.rest = _centre(x, mean, call.channel_dim)
        self.scale = _along(scale, self.centred, call.channel_dim)
        self.g = None if grad_y is None else grad_y.to(self.centred.dtype)
        if self.g is not None and call.activation is not None:
            if call.slope_from == "output":
                at = extra.detach()  # type: ignore[union-attr]  # piecewise linear: see autograd.Call
            else:
                shift = -self.rest * scale if bias is None else bias - self.rest * scale
                at = self.centred * self.scale + _along(shift, self.centred, call.channel_dim)
                at = at if extra is None else at + extra
            self.g = before_activation(self.g, at, call.activation)

    def sums(self) -> tuple[Tensor, Tensor]:
        """As `ByKernel.sums`, in two tensors of (C,)."""
        assert self.g is not None
        dims = tuple(dim for dim in range(self.g.ndim) if dim != self.channel_dim)
        found = self.g.sum(dims), (self.g * self.centred).sum(dims)
        return found[0].to(self.rest.dtype), found[1].to(self.rest.dtype)

    def grad_residual(self) -> Tensor | None:
        """g itself; None where y has no gradient."""
        return self.g

    def grad_x(self, slope: Tensor, constant: Tensor, wants_residual: bool) -> Tensor:
        """`(x - rounded mean) * slope + constant`, times the mask; plus `g * scale` where y has a gradient.

        The last of the passes: where no graph is recorded it overwrites `centred`.
        """
        slope, constant = (_along(values, self.centred, self.channel_dim) for values in (slope, constant))
        # A second derivative needs `centred` as it is; without one, new memory is what would cost most.
        once = not torch.is_grad_enabled()
        found = self.centred.mul_(slope).add_(constant) if once else self.centred * slope + constant
        if self.mask is not None:
            found = found * self.mask.to(found.dtype)
        if self.g is not None:
            found = found.addcmul_(self.g, self.scale) if once else found + self.g * self.scale
        return found.to(self.dtype)


def before_activation(grad_y: Tensor, at: Tensor, activation: str) -> Tensor:
    """The gradient before an activation of `at`, which has a graph where a second derivative needs one."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view, so that the gradient does not go on into what `at` was computed from.
        at = at.view_as(at) if create_graph and at.requires_grad else at.detach().requires_grad_()
        y = reference.ACTIVATIONS[activation](at)
        (found,) = torch.autograd.grad(y, at, grad_y, create_graph=create_graph)
    return found
