"""Batch norm by its definition, in float64: what every kernel is held against."""

import torch

from batchnorm.kernels import reference

EPS = 1e-5


def by_definition(x, weight, bias, residual, grad, activation=None, channel_dim=1, running=None):
    """Output, moments and gradients in float64, by torch.var_mean and autograd."""
    leaves = [
        None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, residual)
    ]
    x, weight, bias, residual = leaves
    view = [-1 if dim == channel_dim % x.ndim else 1 for dim in range(x.ndim)]
    dims = [dim for dim in range(x.ndim) if dim != channel_dim % x.ndim]
    if running is None:
        var, mean = torch.var_mean(x, dims, correction=0)
    else:
        mean, var = (t.double() for t in running)
    z = (x - mean.view(view)) * torch.rsqrt(var.view(view) + EPS)
    z = z if weight is None else z * weight.view(view) + bias.view(view)
    y = reference.finish(z, activation, residual)
    y.backward(grad.double())
    return [y.detach(), mean.detach(), var.detach(), *[None if t is None else t.grad for t in leaves]]
