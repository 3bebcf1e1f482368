"""Batch norm as a pure function: statistics in, output and new statistics out."""

from __future__ import annotations

from torch import Tensor

from batchnorm import checks, padding, running
from batchnorm.ghost import Part, each_virtual_batch
from batchnorm.kernels import choose, reference
from batchnorm.moments import Moments, take
from batchnorm.renorm import Renorm


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    ghost_batch_size: int | None = None,
    renorm: Renorm | tuple[float, float] | dict[str, float] | bool | None = None,
    channel_dim: int = 1,
    correction: float = 1,
    skip_nonfinite: bool = False,
    num_batches_tracked: Tensor | int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Normalise each channel of `x`, and return the running statistics that follow.

    `y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`, with the mean and biased
    variance of the batch when `training`, else the running ones (Ioffe & Szegedy 2015, algorithms 1
    and 2). Nothing is written into; the returned statistics are outside the autograd graph, `y` is
    twice differentiable. Works under torch.func transforms, torch.compile and autocast.

    Args:
        x: floating point, rank 2 or more: (N, C), (N, C, L), (N, C, H, W), ...; half precision is
            normalised by float32 statistics.
        weight, bias, running_mean, running_var: shape (C,), or None.
        training: normalise by the batch, and move the statistics.
        momentum: weight of the new batch in the running statistics, in [0, 1]; None is the cumulative
            average, and needs `num_batches_tracked`.
        eps: added to the variance, above 0.
        activation: name of what is applied last, such as "relu" or "silu".
        residual: added before the activation; the shape of `x`.
        mask: broadcastable to `x`; which positions count (booleans) or how much (non-negative
            weights) in the statistics. Weights are repeats: 2 counts a value twice, and their sum must
            exceed `correction` for statistics to move. All positions are normalised, but what is inf or
            NaN where the mask is 0: in training it stays so in `y`, and spoils no gradient.
        ghost_batch_size: samples per virtual batch, each normalised by itself (Hoffer et al. 2017,
            algorithm 1); the last may be smaller, and takes in a leftover that has one value per channel.
            The running statistics move once, by the moments of the whole batch.
        renorm: batch renormalization's (r_max, d_max) (Ioffe 2017); needs running statistics.
        channel_dim: where the channels are.
        correction: of the running variance: 1 unbiased, as torch; 0 biased, as Keras.
        skip_nonfinite: a batch with an inf or NaN moment leaves the running statistics alone.
        num_batches_tracked: batches already in the running statistics, for `momentum=None`.

    Returns:
        `(y, running_mean, running_var)`; y has the shape and memory layout of `x`, and its dtype unless
        that of `residual` is wider. Statistics that were None stay None.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: a wrong shape, an option out of its range, one value per channel in training.
    """
    checks.check_momentum(momentum)
    checks.check_eps(eps)
    checks.check_correction(correction)
    checks.check_activation(activation, reference.ACTIVATIONS)
    checks.check_ghost_batch_size(ghost_batch_size)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together: pass both or neither")
    channel_dim = check_input(x, channel_dim, training, residual, mask, ghost_batch_size)
    checks.check_channels(
        x, channel_dim, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    y, moments = normalize(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        training=training,
        eps=eps,
        activation=activation,
        residual=residual,
        mask=mask,
        ghost_batch_size=ghost_batch_size,
        renorm=Renorm.parse(renorm),
        channel_dim=channel_dim,
    )
    if moments is None or running_mean is None or running_var is None:
        return y, running_mean, running_var
    mean, var, _ = running.moved(
        running_mean,
        running_var,
        moments,
        factor=running.averaging_factor(momentum, num_batches_tracked, moments.mean.dtype),
        correction=correction,
        skip_nonfinite=skip_nonfinite,
    )
    return y, mean, var


def check_input(
    x: Tensor,
    channel_dim: int,
    training: bool,
    residual: Tensor | None,
    mask: Tensor | None,
    ghost_batch_size: int | None,
) -> int:
    """Raise unless the tensors fit each other; return `channel_dim` counted from the front."""
    channel_dim = checks.resolve_channel_dim(x, channel_dim)
    checks.statistics_dtype(x)
    if residual is not None:
        checks.check_residual(residual, x)
    if mask is not None:
        checks.check_mask(mask, x)
    if training:
        checks.check_ghost_batch_size(ghost_batch_size, channel_dim)
        checks.check_values_per_channel(x, channel_dim, ghost_batch_size)
    return channel_dim


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
    ghost_batch_size: int | None,
    renorm: Renorm | None,
    channel_dim: int,
) -> tuple[Tensor, Moments | None]:
    """The output, and in training the moments of the batch; the inputs are taken as checked."""
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("training=False normalises by running_mean and running_var: pass both")
        per_channel = weight, bias, running_mean, running_var
        kernel = choose(x, channel_dim, per_channel, residual, activation, training=False)
        if running_mean.requires_grad or running_var.requires_grad:
            kernel = reference  # the only one that is differentiable in them
        y = kernel.inference(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            eps=eps,
            channel_dim=channel_dim,
            activation=activation,
            residual=residual,
        )
        return y, None
    if mask is None and renorm is None and (ghost_batch_size is None or ghost_batch_size >= x.shape[0]):
        kernel = choose(x, channel_dim, (weight, bias), residual, activation)
        return kernel.training(
            x, weight, bias, eps=eps, channel_dim=channel_dim, activation=activation, residual=residual
        )

    def normalize_part(part: Part) -> tuple[Tensor, Moments]:
        batch = take(part.x, part.reduced, part.mask)
        if mask is not None and x.numel() > 0:
            checks.check_masked_count(batch.count, mask, ghost_batch_size)
        scale, shift = reference.scale_and_shift(batch.var(), weight, bias, eps)
        if renorm is not None:
            if running_mean is None or running_var is None:
                raise ValueError("renorm corrects towards running_mean and running_var: pass both")
            scale, shift = renorm.correct(scale, shift, batch, running_mean, running_var, weight, eps)
        return reference.apply(part.x, batch.mean, scale, shift, part.axes), batch

    def normalize_parts(x: Tensor) -> tuple[Tensor, Moments]:
        y, moments = each_virtual_batch(normalize_part, x, mask, ghost_batch_size, channel_dim)
        return reference.finish(y, activation, residual), moments

    return normalize_parts(x) if mask is None else padding.left_out_of(normalize_parts, x, mask)
