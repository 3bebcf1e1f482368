"""What kernels are held against: batch norm by its definition, and torch's own where that is not finite."""

import torch

from batchnorm.kernels import native, reference

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


def assert_not_finite_where_torch_is(kernel, kind, x, weight, bias, grad, activation=None):
    """With NaN or inf of this kind in a channel, a kernel's results are NaN or inf where torch's are."""
    value = torch.nan if "nan" in kind else torch.inf
    if kind.startswith("one"):
        x[1, 1].view(-1)[-1] = value
    else:
        x[1, 1] = value
        x[0, 1] = -torch.inf if kind == "both infs" else 0.0
    leaves = [[t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2)]
    found = []
    for each, (x, weight, bias) in zip((kernel, native), leaves, strict=True):
        y, moments = each.training(x, weight, bias, eps=EPS, channel_dim=1, activation=activation)
        y.backward(grad)
        found.append([y, moments.mean, moments.m2, x.grad, weight.grad, bias.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
