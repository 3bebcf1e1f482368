"""Batch norm over the processes of a group: one all-reduce forward, one backward, of sums in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm import checks, recipes
from batchnorm.context import under_transform, values_can_be_read
from batchnorm.kernels import choose, cpu, reference
from batchnorm.moments import Moments, take
from batchnorm.names import describe
from batchnorm.renorm import Renorm


class Group:
    """A process group in a layer: copies of the layer share it, a pickle cannot hold it."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __repr__(self) -> str:
        return f"<ranks {dist.get_process_group_ranks(self.group)}>"

    def __deepcopy__(self, memo: Any) -> Group:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a layer with a process group as its sync cannot be pickled, because a group lives in one "
            "process: save model.state_dict(), or set layer.sync = True (the default group) first"
        )


def parse(value: Any) -> bool | Group:
    """What a layer keeps of `value`, its `sync`: False, True (the default group) or a process group."""
    if isinstance(value, bool):
        return value
    if dist.is_available():
        if value is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "this process is not a member of the process group given as sync: give each process a group "
                "that it is in (torch.distributed.new_subgroups), or False"
            )
        if isinstance(value, dist.ProcessGroup):
            return Group(value)
    raise TypeError(
        f"sync={value!r} is not understood: expected True (the default process group), False, or a "
        "torch.distributed process group"
    )


def group_of(sync: bool | Group) -> Any:
    """The process group to communicate with, or None where there is no other process."""
    if sync is False or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if sync is True else sync.group
    return group if dist.get_world_size(group) > 1 else None


class Processes(NamedTuple):
    """The processes of a group, and who adds numbers over them."""

    group: Any
    caller: str

    @classmethod
    def of(cls, group: Any, layer: nn.Module) -> Processes:
        """For a layer. Its name is looked up once: in a backward pass no model is on the stack."""
        name = _names.get(layer)
        if name is None:
            name = _names[layer] = describe(layer)
        return cls(group, name)

    def add(self, numbers: Tensor) -> Tensor:
        """Replace `numbers` by their sum over the processes; RuntimeError where one does not take part."""
        return self._all_reduce(numbers, dist.ReduceOp.SUM)

    def largest(self, numbers: Tensor) -> Tensor:
        """Replace each of `numbers` by the largest that a process has."""
        return self._all_reduce(numbers, dist.ReduceOp.MAX)

    def rank(self) -> int:
        """This process, as all others know it."""
        return dist.get_rank()

    def _all_reduce(self, numbers: Tensor, operation: Any) -> Tensor:
        try:
            dist.all_reduce(numbers, operation, self.group)
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self.group)
            raise RuntimeError(
                f"{self.caller}: the all-reduce over the processes of ranks {ranks} failed on rank "
                f"{self.rank()}. Has one left the loop early, or failed? All must run the same layers "
                "equally often; one that is out of data takes part with an empty batch, x[:0]. The "
                f"backend says: {error}"
            ) from error
        return numbers


_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class _Sum(torch.autograd.Function):
    """The sum over processes; the gradient of the sum of every process's loss is summed in turn."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.add(numbers.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.apply(grad, ctx.processes), None


def add_moments(moments: Moments, processes: Processes, shared_count: bool) -> Moments:
    """The moments of every process's values together, by one all-reduce.

    What is added is `(n, n*mean, m2 + n*mean**2)`, 2C+1 numbers in float64 (3C where channels have counts of
    their own). The subtraction that follows costs the variance a relative error of about
    `1e-16 * (mean/std)**2`, which is less than what the rounding of float32 inputs has done to it already.
    """
    mean, dtype = moments.mean, moments.count.dtype
    count = moments.count.reshape(-1)[:1] if shared_count else moments.count.expand_as(mean)
    first = moments.count * mean
    sums = processes.add(torch.cat([count, first, moments.m2.to(dtype) + first * mean]))
    channels = mean.numel()
    count, first, second = sums.split([sums.numel() - 2 * channels, channels, channels])
    mean = first / count.where(count > 0, 1)
    m2 = (second - first * mean).clamp_min(0)
    return Moments(count.reshape(()).clone() if shared_count and channels else count.clone(), mean, m2)


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

    call = _Call(processes, eps, channel_dim, correction)
    z, *of_all = _Normalise.apply(x, weight, bias, mask, call)
    moments = Moments(*[number.detach() for number in of_all])
    if not (recipes.is_recording() and torch.is_grad_enabled()):
        return reference.finish(z, activation, residual), moments
    _offer(z, x, moments, weight, bias, call)
    if activation is None and residual is None:
        return z, moments
    y = _Finish.apply(z, residual, activation)
    _offer(y, x, moments, weight, bias, call, activation, residual)
    return y, moments


@torch.no_grad()
def _offer(
    y: Tensor,
    x: Tensor,
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    call: _Call,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> None:
    """Let the backward pass compute `y` again, without communication."""
    scale, shift = _scale_and_shift(moments, weight, bias, call.correction(moments), call.eps)
    shift = None if shift is None else shift.clone()  # it may be the bias, which a step will change

    def rebuild(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return reference.finish(_apply(x, moments.mean, scale, shift, call.channel_dim), activation, residual)

    recipes.offer(y, (x,) if residual is None else (x, residual), rebuild)


class _Call(NamedTuple):
    """What a normalisation needs besides tensors."""

    processes: Processes
    eps: float
    channel_dim: int
    correction: Callable[[Moments], tuple[Tensor, Tensor] | None]


class _Normalise(torch.autograd.Function):
    """`(x - mean) / sqrt(m2 / count + eps) * weight + bias`, and the count, mean and m2.

    The mean and m2 are outputs that have gradients, so that the operations of the backward pass, which start
    from them, are differentiable once more.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shared_count = mask is None or _size_along(mask, call.channel_dim, x.ndim) == 1
        moments = add_moments(_take(x, mask, call.channel_dim), call.processes, shared_count)
        _check_count(moments.count, x, mask)
        ctx.call, ctx.correction = call, call.correction(moments)
        scale, shift = _scale_and_shift(moments, weight, bias, ctx.correction, call.eps)
        y = _apply(x, moments.mean, scale, shift, call.channel_dim)
        ctx.save_for_backward(x, weight, mask, moments.count, moments.mean, moments.m2)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(moments.count)
        return y, moments.count, moments.mean, moments.m2

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, _: None, grad_mean: Tensor | None, grad_m2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, mask, count, mean, m2 = ctx.saved_tensors
        call = ctx.call
        count = count.where(count > 0, 1)  # no process has a value: nothing to divide
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_mean = torch.zeros_like(mean) if grad_mean is None else grad_mean
        grad_m2 = torch.zeros_like(m2) if grad_m2 is None else grad_m2
        gain = torch.rsqrt(m2 / count + call.eps)
        if ctx.correction is not None:
            gain = gain * ctx.correction[0]
        scale = gain if weight is None else gain * weight
        centred, rest = _centre(x, mean, call.channel_dim)
        grad_weight = grad_bias = grad_x = None
        if grad_y is not None:
            dims = tuple(dim for dim in range(x.ndim) if dim != call.channel_dim)
            grad_y = grad_y.to(centred.dtype)
            by_grad = grad_y.sum(dims).to(mean.dtype)
            by_x = (grad_y * centred).sum(dims).to(mean.dtype) - rest * by_grad
            if wants_weight:
                grad_weight = by_x * gain
                if ctx.correction is not None:
                    grad_weight = grad_weight + by_grad * ctx.correction[1]
            if wants_bias:
                grad_bias = by_grad
            grad_mean = grad_mean - scale * by_grad
            grad_m2 = grad_m2 - scale * by_x / (2 * (m2 + call.eps * count))
        if wants_x:
            sums = _Sum.apply(torch.cat([grad_mean, grad_m2]), call.processes)
            grad_mean, grad_m2 = sums.split(mean.numel())
            slope = 2 * grad_m2
            constant = grad_mean / count - slope * rest
            slope, constant, scale = (
                _along(values, centred, call.channel_dim) for values in (slope, constant, scale)
            )
            # A second derivative needs `centred` as it is; without one, new memory is what would cost most.
            once = not torch.is_grad_enabled()
            grad_x = centred.mul_(slope).add_(constant) if once else centred * slope + constant
            if mask is not None:
                grad_x = grad_x * mask.to(grad_x.dtype)
            if grad_y is not None:
                grad_x = grad_x.addcmul_(grad_y, scale) if once else grad_x + grad_y * scale
            grad_x = grad_x.to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None


class _Finish(torch.autograd.Function):
    """`reference.finish`, which keeps its inputs, that can be built again, and not its output."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        ctx.save_for_backward(z, residual)
        ctx.activation = activation
        return reference.finish(z, activation, residual)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, so that a gradient does not go on from one of them into the other.
            inputs = [
                tensor.view_as(tensor)
                if create_graph and tensor.requires_grad
                else tensor.detach().requires_grad_()
                for tensor in ctx.saved_tensors
                if tensor is not None
            ]
            y = reference.finish(inputs[0], ctx.activation, inputs[1] if len(inputs) > 1 else None)
            gradients = torch.autograd.grad(y, inputs, grad_y, create_graph=create_graph)
        return (*gradients, *[None] * (3 - len(gradients)))


def _take(x: Tensor, mask: Tensor | None, channel_dim: int) -> Moments:
    """The moments of this process's batch, by the fastest way that keeps the mean in float64."""
    if mask is None and choose(x, channel_dim) is cpu:
        return cpu.training(x, None, None, eps=1.0, channel_dim=channel_dim)[1]
    return take(x, tuple(dim for dim in range(x.ndim) if dim != channel_dim), mask)


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


def _apply(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor | None, channel_dim: int) -> Tensor:
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
    values = x.to(checks.statistics_dtype(x))
    rounded = mean.to(values.dtype)
    return values - _along(rounded, values, channel_dim), mean - rounded


def _along(values: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    shape = [1] * x.ndim
    shape[channel_dim] = -1
    return values.to(x.dtype).view(shape)


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
