"""Batch norm over the processes of a group: one all-reduce forward, one backward, of sums in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import checks, padding, passes, recipes
from batchnorm.context import under_transform, values_can_be_read
from batchnorm.distributed import Processes, Sum, add_moments
from batchnorm.kernels import choose, cpu, cuda, reference
from batchnorm.kernels.autograd import FUSED, has_memory, in_layout_of, slope_from
from batchnorm.moments import Moments
from batchnorm.renorm import Renorm


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    group: Any,
    layer: nn.Module,
    *,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
    renorm: Renorm | None,
    channel_dim: int,
) -> tuple[Tensor, Moments]:
    """The output for this process's batch, and the moments of every process's batch together.

    As `functional.normalize` in training on one process that is given the batches of all, for any number
    of samples per process, none included. Twice differentiable: the gradient of a process's inputs is that
    of the sum of every process's loss, the gradients of weight and bias are this process's own.

    What goes on between the all-reduces is done by the compiled kernels where they are worth calling: each
    process decides by its own batch, and what it says to the others is the same.
    """
    processes = Processes.of(group, layer)
    if under_transform():
        raise RuntimeError(
            f"{processes.caller}: a torch.func transform cannot look into the all-reduce of a synchronised "
            "layer: set layer.sync = False, or take gradients with torch.autograd"
        )
    if mask is not None and mask.requires_grad:
        raise ValueError("a synchronised layer has no gradient for its mask: pass mask.detach()")

    def correction(moments: Moments) -> tuple[Tensor, Tensor] | None:
        if renorm is None:
            return None
        assert running_mean is not None  # by the layer
        assert running_var is not None
        one = torch.ones_like(moments.mean)
        return renorm.correct(one, None, moments, running_mean, running_var, None, eps)

    def by_torch(x: Tensor) -> tuple[Tensor, Moments]:
        call = passes.Call(processes, None, eps, channel_dim, None, "x", correction)
        z, moments = _run(call, x, weight, bias, None, mask)
        if not (recipes.is_recording() and torch.is_grad_enabled()):
            return reference.finish(z, activation, residual), moments
        _offer(z, x, moments, weight, bias, call)
        if activation is None and residual is None:
            return z, moments
        y = _Finish.apply(z, residual, activation)
        _offer(y, x, moments, weight, bias, call, activation, residual)
        return y, moments

    if mask is not None:
        return padding.left_out_of(by_torch, x, mask)
    kernel = choose(x, channel_dim, (weight, bias), residual, activation)
    if kernel not in (cpu, cuda) or renorm is not None:
        return by_torch(x)
    fused = activation if activation in FUSED else None
    residual = None if residual is None else in_layout_of(x, residual)
    call = passes.Call(processes, kernel, eps, channel_dim, fused, slope_from(fused, residual), correction)
    y, moments = _run(call, x, weight, bias, residual, None)
    return reference.finish(y, None if fused else activation, None), moments


def _run(
    call: passes.Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Moments]:
    """The output, with a graph where gradients are wanted, and the moments of all processes."""
    y, *of_all = _Normalise.apply(x, weight, bias, residual, mask, call)
    return y, Moments(*[number.detach() for number in of_all])


class _Normalise(torch.autograd.Function):
    """`activation((x - mean) / sqrt(m2 / count + eps) * weight + bias + residual)`; count, mean and m2.

    The mean and m2 are outputs that have gradients, so that the operations of the backward pass, which start
    from them, are differentiable once more. The gradients of both are what processes add up, whether kernels
    have found them or not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        call: passes.Call,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shared_count = mask is None or _size_along(mask, call.channel_dim, x.ndim) == 1
        moments = add_moments(passes.statistics(x, mask, call), call.processes, shared_count)
        _check_count(moments.count, x, mask)
        ctx.call, ctx.correction = call, call.correction(moments)
        if call.kernel is None:
            scale, shift = _scale_and_shift(moments, weight, bias, ctx.correction, call.eps)
            y = passes.apply(x, moments.mean, scale, shift, call.channel_dim)
        else:
            fused = {"channel_dim": call.channel_dim, "activation": call.activation, "residual": residual}
            y, ctx.table = call.kernel.apply(x, moments, weight, bias, eps=call.eps, **fused)
            if any(ctx.needs_input_grad) and recipes.is_recording():
                _offer_by_kernel(y, x, residual, ctx.table, call)
        extra = {"x": None, "residual": residual, "output": y}[call.slope_from]
        shift_of_z = None if call.activation is None else bias
        ctx.save_for_backward(x, weight, shift_of_z, extra, mask, moments.count, moments.mean, moments.m2)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(moments.count)
        return y, moments.count, moments.mean, moments.m2

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, _: None, grad_mean: Tensor | None, grad_m2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, extra, mask, count, mean, m2 = ctx.saved_tensors
        call = ctx.call
        count = count.where(count > 0, 1)  # no process has a value: nothing to divide
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        grad_mean = torch.zeros_like(mean) if grad_mean is None else grad_mean
        grad_m2 = torch.zeros_like(m2) if grad_m2 is None else grad_m2
        gain = torch.rsqrt(m2 / count + call.eps)
        if ctx.correction is not None:
            gain = gain * ctx.correction[0]
        scale = gain if weight is None else gain * weight
        over_memory: passes.ByKernel | passes.ByTorch
        if call.kernel is None or grad_y is None or torch.is_grad_enabled() or not has_memory(grad_y):
            over_memory = passes.ByTorch(call, grad_y, x, extra, mask, mean, scale, bias)
        else:
            over_memory = passes.ByKernel(call, grad_y, x, extra, mean, ctx.table)
        grad_weight = grad_bias = grad_residual = grad_x = None
        if grad_y is not None:
            by_grad, by_x = over_memory.sums()
            by_x = by_x - over_memory.rest * by_grad
            if wants_weight:
                grad_weight = by_x * gain
                if ctx.correction is not None:
                    grad_weight = grad_weight + by_grad * ctx.correction[1]
            if wants_bias:
                grad_bias = by_grad
            if wants_residual:
                grad_residual = over_memory.grad_residual()
            grad_mean = grad_mean - scale * by_grad
            grad_m2 = grad_m2 - scale * by_x / (2 * (m2 + call.eps * count))
        if wants_x:
            sums = Sum.apply(torch.cat([grad_mean, grad_m2]), call.processes)
            grad_mean, grad_m2 = sums.split(mean.numel())
            slope = 2 * grad_m2
            grad_x = over_memory.grad_x(slope, grad_mean / count - slope * over_memory.rest, wants_residual)
        return grad_x, grad_weight, grad_bias, grad_residual, None, None


class _Finish(torch.autograd.Function):
    """`reference.finish`, which keeps its inputs, that can be built again, and not its output."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        ctx.save_for_backward(z, residual)
        ctx.activation = activation
        return reference.finish(z, activation, residual)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, residual = ctx.saved_tensors
        at = z if residual is None else z + residual
        grad = grad_y if ctx.activation is None else passes.before_activation(grad_y, at, ctx.activation)
        return grad, None if residual is None else grad, None


@torch.no_grad()
def _offer(
    y: Tensor,
    x: Tensor,
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    call: passes.Call,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> None:
    """Let the backward pass compute `y` again, without communication."""
    scale, shift = _scale_and_shift(moments, weight, bias, call.correction(moments), call.eps)
    shift = None if shift is None else shift.clone()  # it may be the bias, which a step will change

    def rebuild(x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = passes.apply(x, moments.mean, scale, shift, call.channel_dim)
        return reference.finish(z, activation, residual)

    recipes.offer(y, (x,) if residual is None else (x, residual), rebuild)


def _offer_by_kernel(y: Tensor, x: Tensor, residual: Tensor | None, table: Tensor, call: passes.Call) -> None:
    """The same for what a kernel has computed."""
    assert call.kernel is not None
    apply_again = call.kernel.apply_again

    def rebuild(x: Tensor, residual: Tensor | None = None) -> Tensor:
        again: Tensor = apply_again(
            x, table, channel_dim=call.channel_dim, activation=call.activation, residual=residual
        )
        return again

    recipes.offer(y, (x,) if residual is None else (x, residual), rebuild)


def _scale_and_shift(
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    correction: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.scale_and_shift`, corrected by renorm's r and d."""
    scale, shift = reference.scale_and_shift(moments.var(), weight, bias, eps)
    if correction is None:
        return scale, shift
    r, d = correction
    by_d = d if weight is None else d * weight
    return scale * r, by_d if shift is None else shift + by_d


def _check_count(count: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """Raise, on every process alike, when they have too few values together and that can be seen."""
    if mask is not None and x.numel() > 0:
        checks.check_masked_count(count, mask)
    elif values_can_be_read(count) and bool((count == 1).any()):
        raise ValueError(
            "Expected more than 1 value per channel when training, got an input of shape "
            f"{tuple(x.shape)} and 1 value on all processes together: its variance would be 0. Use larger "
            "batches, or call eval() to use the running statistics"
        )


def _size_along(mask: Tensor, dim: int, ndim: int) -> int:
    """The size of `mask` along a dimension of the `ndim` that it broadcasts to."""
    dim -= ndim - mask.ndim
    return mask.shape[dim] if dim >= 0 else 1
