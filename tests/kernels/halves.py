"""Batch norm over processes by the halves of a kernel, all processes in this one."""

from types import ModuleType

import torch
from torch import Tensor

from batchnorm.checks import statistics_dtype
from batchnorm.kernels.autograd import slope_from
from batchnorm.moments import Moments


def by_halves(
    kernel: ModuleType,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    grad: Tensor,
    *,
    eps: float,
    activation: str | None = None,
    channel_dim: int = 1,
    samples: tuple[int, ...] = (),
) -> list[Tensor | None]:
    """Output, mean, variance and gradients, by processes with so many samples each; the last has the rest."""
    sizes = [*samples, len(x) - sum(samples)]
    options = {"channel_dim": channel_dim, "activation": activation}
    xs, grads = x.split(sizes), grad.split(sizes)
    residuals = [None] * len(sizes) if residual is None else residual.split(sizes)
    first, *others = [kernel.statistics(part, channel_dim=channel_dim) for part in xs]
    moments = first.merge(*others)
    moments = Moments(moments.count.reshape(-1)[0], moments.mean, moments.m2)
    outputs, tables, sums, kept = [], [], [], []
    for part, of_part in zip(xs, residuals, strict=True):
        y, table = kernel.apply(part, moments, weight, bias, eps=eps, residual=of_part, **options)
        assert (y.dtype, y.stride()) == (part.dtype, part.stride())
        again = kernel.apply_again(part, table, residual=of_part, **options)
        assert torch.equal(again.nan_to_num(), y.nan_to_num())
        outputs.append(y)
        tables.append(table)
    for k, part in enumerate(xs):
        source = slope_from(activation, residuals[k])
        extra = {"x": None, "residual": residuals[k], "output": outputs[k]}[source]
        found, grad_z = kernel.backward_sums(
            grads[k], part, tables[k], slope_from=source, extra=extra, **options
        )
        assert grad_z is not None or activation is None or residual is None
        sums.append(found)
        kept.append(grad_z)
    invstd = torch.rsqrt(moments.var() + eps)
    scale = invstd if weight is None else invstd * weight
    rest = moments.mean - moments.mean.to(statistics_dtype(x))
    by_grad, by_x = sum(sums)
    by_x = by_x - rest * by_grad
    slope = -scale * invstd.square() * by_x / moments.count
    coefficients = torch.stack([slope, -scale * by_grad / moments.count - rest * slope])
    of_x = []
    for k, part in enumerate(xs):
        if kept[k] is None:
            of_x.append(kernel.backward_apply(grads[k], part, tables[k], coefficients, **options))
            continue
        found = kernel.backward_apply(kept[k], part, tables[k], coefficients, channel_dim=channel_dim)
        own = kept[k].clone()
        written = kernel.backward_apply(own, part, tables[k], coefficients, channel_dim=channel_dim, out=own)
        assert written is own
        assert torch.equal(written.nan_to_num(), found.nan_to_num())
        of_x.append(found)
    of_residual = grad if activation is None or kept[0] is None else torch.cat(kept)
    return [
        torch.cat(outputs),
        moments.mean,
        moments.var(),
        torch.cat(of_x),
        None if weight is None else by_x * invstd,
        None if bias is None else by_grad,
        None if residual is None else of_residual,
    ]
