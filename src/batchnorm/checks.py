"""What an input and an option must be; every failure says what was given, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from batchnorm.context import values_can_be_read

_STATISTICS_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype that statistics of `x` are kept in: float32 for half precision, else that of `x`."""
    dtype = _STATISTICS_DTYPE.get(x.dtype)
    if dtype is None:
        raise TypeError(
            f"expected a float64, float32, bfloat16 or float16 tensor, got {x.dtype}: convert it first, "
            "for example x.float()"
        )
    return dtype


def resolve_channel_dim(x: Tensor, channel_dim: int) -> int:
    """`channel_dim` counted from the front, once `x` is seen to have two dimensions and that one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(x).__name__}: wrap it in torch.as_tensor(...)")
    if x.ndim < 2:
        raise ValueError(
            f"expected an input of rank 2 or more, (N, C) or (N, C, ...), got shape {tuple(x.shape)}"
        )
    if not -x.ndim <= channel_dim < x.ndim:
        raise ValueError(f"channel_dim={channel_dim} is no dimension of an input of shape {tuple(x.shape)}")
    return channel_dim % x.ndim


def check_channels(x: Tensor, channel_dim: int, **per_channel: Tensor | None) -> None:
    """Raise unless every tensor in `per_channel` has one value per channel of `x`."""
    channels = x.shape[channel_dim]
    for name, tensor in per_channel.items():
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but the input of shape {tuple(x.shape)} has "
                f"{channels} channels along dimension {channel_dim}: expected shape ({channels},). "
                "Channels elsewhere? Say so with channel_dim"
            )


def check_values_per_channel(x: Tensor, channel_dim: int, ghost_batch_size: int | None = None) -> None:
    """Raise when a batch to be normalised by its own statistics has one value per channel."""
    values = x.numel() // max(x.shape[channel_dim], 1)
    if ghost_batch_size is not None and ghost_batch_size < x.shape[0]:
        values = values // x.shape[0] * ghost_batch_size
    if values == 1:
        ghost = "" if ghost_batch_size is None else f" with ghost_batch_size={ghost_batch_size}"
        raise ValueError(
            f"Expected more than 1 value per channel when training, got an input of shape "
            f"{tuple(x.shape)}{ghost}: its variance would be 0. Use a larger batch, drop the last incomplete "
            "one with DataLoader(..., drop_last=True), or call eval() to use the running statistics"
        )


def check_residual(residual: Tensor, x: Tensor) -> None:
    """Raise unless `residual` has the shape of `x`."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"expected residual to be a torch.Tensor, got {type(residual).__name__}")
    if residual.shape != x.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, expected the input's own, {tuple(x.shape)}: "
            "project the shortcut to it first"
        )


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Raise unless `mask` broadcasts to `x` and holds booleans or non-negative weights."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"expected mask to be a torch.Tensor, got {type(mask).__name__}")
    if not _broadcasts(mask.shape, x.shape):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not broadcast to the input's {tuple(x.shape)}: give it "
            "the input's rank, with 1 where all positions share a value, for example (N, 1, L) for (N, C, L)"
        )
    if mask.is_complex():
        raise TypeError(f"expected a mask of booleans or non-negative weights, got {mask.dtype}")
    if mask.dtype == torch.bool or not values_can_be_read(mask):
        return
    if not bool(((mask >= 0) & (mask < torch.inf)).all()):
        raise ValueError(
            "expected a mask of booleans or non-negative weights, got a negative, infinite or NaN weight"
        )


def check_masked_count(count: Tensor, mask: Tensor, ghost_batch_size: int | None = None) -> None:
    """Raise when the mask leaves a channel no value, or only one, where that can be seen without a sync."""
    if not values_can_be_read(count) or count.numel() == 0:
        return
    fewest = float(count.min())
    ghost = "" if ghost_batch_size is None else f" in a virtual batch (ghost_batch_size={ghost_batch_size})"
    if fewest == 0:
        raise ValueError(
            f"the mask of shape {tuple(mask.shape)} is empty: it leaves a channel without a single value to "
            f"take statistics from{ghost}. Drop such batches, or call eval() to use the running statistics"
        )
    if fewest == 1 and mask.dtype == torch.bool:
        raise ValueError(
            f"Expected more than 1 value per channel when training, but the mask of shape "
            f"{tuple(mask.shape)} leaves a channel one{ghost}: its variance would be 0. Use larger batches, "
            "or call eval() to use the running statistics"
        )


def check_eps(eps: float) -> None:
    """Raise unless eps > 0."""
    if not eps > 0:
        raise ValueError(f"eps={eps} must be above 0: it keeps a channel without variance finite, try 1e-5")


def check_momentum(momentum: float | None) -> None:
    """Raise unless momentum is None or in [0, 1]."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum={momentum} is outside [0, 1]: it is the weight of the new batch (torch's meaning; "
            "Keras's 0.99 is 0.01 here), and None is the cumulative average"
        )


def check_ghost_batch_size(ghost_batch_size: int | None, channel_dim: int = 1) -> None:
    """Raise unless ghost_batch_size is None or at least 1, with the batch along dimension 0."""
    if ghost_batch_size is None:
        return
    if isinstance(ghost_batch_size, float) or ghost_batch_size < 1:
        raise ValueError(f"ghost_batch_size={ghost_batch_size} must be a whole number of samples, 1 or more")
    if channel_dim == 0:
        raise ValueError(
            "ghost_batch_size splits the batch along dimension 0, where channel_dim=0 puts the channels: "
            "move the channels elsewhere, for example x.transpose(0, 1)"
        )


def check_correction(correction: float) -> None:
    """Raise unless correction >= 0."""
    if not correction >= 0:
        raise ValueError(
            f"correction={correction} must be 0 or more: 1 keeps the unbiased running variance (torch's), "
            "0 the biased one (Keras's)"
        )


def check_activation(activation: str | None, known: Iterable[str]) -> None:
    """Raise unless activation is None or one of the known names."""
    if activation is not None and activation not in known:
        raise ValueError(f"unknown activation {activation!r}: expected None or one of {', '.join(known)}")


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False)
    )


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, short enough for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
