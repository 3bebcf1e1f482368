"""The autograd function around kernels that see memory, not tensors: what is saved, what is built again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from batchnorm import recipes
from batchnorm.kernels import reference
from batchnorm.kernels.holders import has_no_other_holder

FUSED = frozenset({
    None, "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "sigmoid", "hardsigmoid",
    "tanh",
})  # fmt: skip
# Their slope can be told from the output, which the next layer keeps anyway, not only from the residual.
_SLOPE_FROM_OUTPUT = frozenset({"relu", "relu6", "leaky_relu"})
_PLAIN_TYPES = (Tensor, nn.Parameter)

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_dispatch_modes = torch._C._len_torch_dispatch_stack


class Call(ABC):
    """One normalisation: what its forward leaves for its backward, besides tensors that autograd watches.

    Attributes:
        by_batch: normalise by the moments of the batch, whose gradients count then, or by given statistics.
        slope_from: what tells the slope of the activation: z computed from "x", that and the "residual",
            the "output", or "bits", one for each value.
        bits: those that `forward` is to leave, until autograd has them.
        offers: whether the output may be replaced by its recipe.
        overwrites: whether `backward` would rather write over the gradient of y than find new memory.
    """

    __slots__ = (
        "activation", "bias", "bits", "by_batch", "channel_dim", "eps", "offers", "overwrites", "slope_from",
        "unfused", "versions", "weight",
    )  # fmt: skip

    def __init__(
        self, channel_dim: int, by_batch: bool, eps: float, activation: str | None, residual: Tensor | None
    ) -> None:
        self.channel_dim = channel_dim
        self.by_batch = by_batch
        self.eps = eps
        fused = activation in FUSED
        self.activation = activation if fused else None
        # What is left for torch to apply.
        self.unfused = None if fused else activation
        self.slope_from = "x" if residual is None else slope_from(self.activation, residual)
        # Only a second derivative asks for these, so autograd is spared the watch over them.
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.versions: tuple[int, int] = (0, 0)
        self.bits: Tensor | None = None
        self.offers = recipes.is_recording()
        self.overwrites = False

    @abstractmethod
    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """The output; the statistics it was normalised by stay with the call."""

    @abstractmethod
    def prepare_again(self) -> None:
        """Let `forward` normalise by the statistics that it has left, and move none."""

    @abstractmethod
    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        extra: Tensor | None,
        wanted: tuple[bool, ...],
        may_overwrite: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and residual, one of which may be written over grad_y if so told."""

    @abstractmethod
    def mean_and_invstd(self) -> tuple[Tensor, Tensor]:
        """What `forward` has normalised by, per channel."""

    def leave_bits(self) -> None:  # noqa: B027 (not every kernel has any)
        """Let `forward` leave bits instead of the output, where it can: not by default."""

    def with_slope_of_output(self, x: Tensor, extra: Tensor) -> Tensor:
        """A new tensor at which the slope of the activation is that at the output; of `extra`, as x."""
        return extra.detach()

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """The output, with a graph where gradients are wanted."""
        residual = None if residual is None else in_layout_of(x, residual)
        if torch.is_grad_enabled():
            y = _apply(x, weight, bias, residual, self)
        else:
            y = self.forward(x, weight, bias, residual)
        return y if self.unfused is None else reference.ACTIVATIONS[self.unfused](y)

    def again(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The output once more, to the bit."""
        call = copy(self)
        call.prepare_again()
        return call.forward(x, None, None, residual)

    def backward_by_torch(
        self, grad_y: Tensor, x: Tensor, extra: Tensor | None, wanted: tuple[bool, ...], create_graph: bool
    ) -> tuple[Tensor | None, ...]:
        """As `backward`, in torch's operations: for `create_graph=True`, and for gradients under vmap."""
        weight, bias = self.weight, self.bias
        if self.versions != (_version(weight), _version(bias)):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                "operation: the weight or bias of a batch norm"
            )
        residual = extra if self.slope_from == "residual" else None
        # Views, so that a gradient does not go on from one of them into another that it was computed from.
        x = x.view_as(x)
        weight, bias, residual = (
            tensor if tensor is None else tensor.view_as(tensor) for tensor in (weight, bias, residual)
        )
        if self.by_batch:
            z, _ = reference.training(x, weight, bias, eps=self.eps, channel_dim=self.channel_dim)
        else:
            mean, invstd = self.mean_and_invstd()
            invstd = invstd.to(reference.statistics_dtype(x))
            scale = invstd if weight is None else invstd * weight
            z = reference.apply(x, mean, scale, bias, (self.channel_dim,))
        if self.slope_from in {"output", "bits"}:
            # Piecewise linear: its slope at the output is that at z, and has no derivative of its own.
            at_output = self.with_slope_of_output(x, extra).requires_grad_()  # type: ignore[arg-type]
            y = reference.finish(at_output, self.activation, None)
            (grad_y,) = torch.autograd.grad(y, at_output, grad_y, create_graph=create_graph)
            y = z
        else:
            y = reference.finish(z, self.activation, residual)
        inputs = (x, weight, bias, residual)
        asked = [tensor for tensor, wants in zip(inputs, wanted, strict=True) if wants and tensor is not None]
        found = iter(torch.autograd.grad(y, asked, grad_y, create_graph=create_graph) if asked else ())
        gradients = [
            next(found) if wants and tensor is not None else None
            for tensor, wants in zip(inputs, wanted, strict=True)
        ]
        if wanted[3] and residual is None:
            gradients[3] = grad_y
        return tuple(gradients)


class _Normalise(torch.autograd.Function):
    """`activation((x - mean) * invstd * weight + bias + residual)`, by a `Call`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Tensor:
        if call.slope_from == "output" and any(ctx.needs_input_grad):
            call.leave_bits()
        y = call.forward(x, weight, bias, residual)
        if call.offers and any(ctx.needs_input_grad):
            _offer(y, x, residual, call)
        ctx.call = call
        call.weight, call.bias, call.versions = weight, bias, (_version(weight), _version(bias))
        if call.slope_from == "x":
            ctx.save_for_backward(x)
        else:
            extra = {"output": y, "residual": residual, "bits": call.bits}[call.slope_from]
            ctx.save_for_backward(x, extra)
            call.bits = None
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        call, (x, *rest) = ctx.call, ctx.saved_tensors
        extra = rest[0] if rest else None
        wanted, create_graph = ctx.needs_input_grad[:4], torch.is_grad_enabled()
        if not create_graph and has_memory(grad_y):
            may_overwrite = call.overwrites and has_no_other_holder(grad_y)
            return (*call.backward(grad_y, x, extra, wanted, may_overwrite), None)
        with torch.enable_grad():
            return (*call.backward_by_torch(grad_y, x, extra, wanted, create_graph), None)


# What Function.apply calls after it has looked for torch.func transforms, of which there are none where a
# `Call` runs: looking takes as long as much else of a small layer.
_apply = getattr(super(torch.autograd.Function, _Normalise), "apply", _Normalise.apply)


def slope_from(activation: str | None, residual: Tensor | None) -> str:
    """What is to be saved, besides x, to tell the slope of the activation: see `Call`."""
    if residual is None or activation is None:
        return "x"
    return "output" if activation in _SLOPE_FROM_OUTPUT else "residual"


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether the memory of each tensor holds its numbers: kernels see addresses, not tensors."""
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in _PLAIN_TYPES
            and tensor.layout is torch.strided
            and not tensor.is_neg()
            and not _is_wrapped(tensor)  # kept from a torch.func transform that is over
        ):
            return False
    return True


def can_run_here() -> bool:
    """Whether kernels that see memory may run: not while others watch the operations, or derive forward."""
    return not (_dispatch_modes() > 0 or forward_ad._current_level >= 0 or torch._C._is_tracing())


def in_layout_of(x: Tensor, tensor: Tensor) -> Tensor:
    """The numbers of `tensor` in memory that is laid out as that of `x`: itself, where they are already."""
    if tensor.stride() == x.stride() and not tensor.is_neg():
        return tensor
    return torch.empty_like(x).copy_(tensor)


def _offer(y: Tensor, x: Tensor, residual: Tensor | None, call: Call) -> None:
    if residual is None:
        recipes.offer(y, (x,), lambda x: call.again(x, None))
    else:
        recipes.offer(y, (x, residual), call.again)


def has_memory(tensor: Tensor) -> bool:
    """Whether there are numbers to point at: gradients under vmap have none, nor have some zeros."""
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


def _version(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode: it has no gradient either
        return 0
