"""BatchNorm1d, 2d and 3d: drop-in for torch.nn's, with what torch.nn's lack."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from batchnorm import checks, distributed, functional, running, synchronised
from batchnorm.context import in_backward, under_transform
from batchnorm.kernels import choose, reference
from batchnorm.kernels.choice import Choice
from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.moments import Moments
from batchnorm.names import describe
from batchnorm.other_tools import as_leaf, check_reader
from batchnorm.renorm import Renorm

_RenormLike = Renorm | tuple[float, float] | Mapping[str, float] | bool | None

_OPTIONS = {
    "activation": None,
    "sync": False,
    "ghost_batch_size": None,
    "renorm": None,
    "channel_dim": 1,
    "correction": 1,
    "skip_nonfinite": False,
}


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Normalise each channel: `activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`.

    In training by the mean and biased variance of the batch, in eval mode by the running ones (Ioffe &
    Szegedy 2015, algorithms 1 and 2). Same arguments, numbers, Parameters, buffers and state_dict as
    torch.nn's class of the same name.

    Args:
        num_features: number of channels C.
        eps: added to the variance; above 0.
        momentum: weight of the new batch in the running statistics, in [0, 1]; None is the cumulative
            average.
        affine: learn `weight` and `bias`.
        track_running_stats: keep running statistics; without them eval mode uses the batch's.
        activation: name of the activation applied last: "relu", "silu", ...
        sync: normalise by the batches of all processes together: True (the default process group), or a
            group. Training only; as without where there is one process, and with `ghost_batch_size`, whose
            virtual batches are each process's own. One all-reduce of 2C+1 float64 numbers forward, one of 2C
            backward. A process may have an empty batch; a `mask` must have a size of 1 along the channels on
            all processes or on none. Copies share a group; pickles can hold True, not a group.
        ghost_batch_size: normalise every so many samples by themselves (Hoffer et al. 2017).
        renorm: batch renormalization: True, or (r_max, d_max) (Ioffe 2017).
        channel_dim: where the channels are; -1 for (N, L, C).
        correction: of the running variance: 1 unbiased, as torch; 0 biased, as Keras.
        skip_nonfinite: a batch with an inf or NaN moment leaves the running statistics alone.

    Any other keyword (such as `bias` in torch 2.13) goes to torch.nn's class.

    Raises:
        ValueError: an option out of its range; the message says which.
    """

    ghost_batch_size: int | None
    channel_dim: int
    correction: float
    skip_nonfinite: bool

    _sync: bool | distributed.Group = False

    _ranks: tuple[int, ...]
    _expected: str

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        sync: Any = False,
        ghost_batch_size: int | None = None,
        renorm: _RenormLike = None,
        channel_dim: int = 1,
        correction: float = 1,
        skip_nonfinite: bool = False,
        **torch_options: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **torch_options
        )
        self._set_options(
            activation=activation,
            sync=sync,
            ghost_batch_size=ghost_batch_size,
            renorm=renorm,
            channel_dim=channel_dim,
            correction=correction,
            skip_nonfinite=skip_nonfinite,
        )

    def _set_options(self, **options: Any) -> None:
        self._choice = Choice()
        checks.check_eps(self.eps)
        checks.check_momentum(self.momentum)
        checks.check_ghost_batch_size(options["ghost_batch_size"], options["channel_dim"])
        checks.check_correction(options["correction"])
        for name, value in options.items():
            setattr(self, name, value)
        if self.renorm is not None and not self.track_running_stats:
            raise ValueError(
                "renorm corrects towards the running statistics: it needs track_running_stats=True"
            )

    @property
    def activation(self) -> str | None:
        """Name of the activation applied last, or None."""
        return self._activation

    @activation.setter
    def activation(self, name: str | None) -> None:
        checks.check_activation(name, ACTIVATIONS)
        self._activation = name

    @property
    def sync(self) -> Any:
        """False, True (the default process group) or the process group to normalise over."""
        return self._sync.group if isinstance(self._sync, distributed.Group) else self._sync

    @sync.setter
    def sync(self, value: Any) -> None:
        self._sync = distributed.parse(value)

    @property
    def renorm(self) -> Renorm | None:
        """Batch renormalization's (r_max, d_max), or None; may be set as training goes on."""
        return self._renorm

    @renorm.setter
    def renorm(self, value: _RenormLike) -> None:
        self._renorm = Renorm.parse(value)

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`activation(normalise(x) + residual)`, in the shape, dtype and memory layout of `x`.

        The dtype is that of `residual` where it is wider.

        Args:
            x: C channels along `channel_dim`.
            residual: added before the activation; the shape of `x`.
            mask: broadcastable to `x`; which positions count (booleans), or how much (non-negative
                weights), in the statistics. All positions are normalised, but what is inf or NaN where the
                mask is 0: in training it stays so in the output, and spoils no gradient.

        Raises:
            TypeError: not a tensor, or not floating point.
            ValueError: a wrong shape, or one value per channel in training.
        """
        if type(x) is not Tensor and (leaf := as_leaf(self, x, residual, mask)) is not None:
            return leaf
        return self._run(x, residual, mask, self._activation)

    def _run(self, x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None) -> Tensor:
        """`forward` with any activation."""
        group = None if self._sync is False else self._group()
        if mask is None and group is None:
            training = self.training
            per_channel = weight, bias, mean, var = self._per_channel()
            kernel, channel_dim = self._choose(self._choice, x, per_channel, residual, activation, training)
            if kernel is not reference and training:
                counter = self._buffers["num_batches_tracked"]
                if not self.track_running_stats or in_backward():
                    mean, var, counter = self._unmoved(mean, var)
                return kernel.training_and_moving(
                    x, weight, bias, mean, var, counter, self.momentum, self.eps, channel_dim,
                    activation, residual,
                )  # fmt: skip
            if kernel is not reference and _is_constant(mean) and _is_constant(var):
                return kernel.inference(
                    x, mean, var, weight, bias, eps=self.eps, channel_dim=channel_dim,
                    activation=activation, residual=residual,
                )  # fmt: skip
        else:
            channel_dim = self._check_input(x, residual, mask, group)
        return self._forward_any(x, residual, mask, channel_dim, group, activation)

    def _per_channel(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        # Not self.weight: each look-up by nn.Module costs a small layer a microsecond.
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is None or bias is None:
            weight, bias = self.weight, self.bias  # parametrized, or there is none
        return weight, bias, self._buffers["running_mean"], self._buffers["running_var"]

    def _choose(
        self,
        kept: Choice,
        x: Tensor,
        per_channel: tuple[Tensor | None, ...],
        residual: Tensor | None,
        activation: str | None,
        moving: bool,
    ) -> tuple[Any, int]:
        """The kernel for tensors that are seen to fit, without a mask or a group, and `channel_dim`.

        Args:
            moving: the kernel is to move the running statistics, if they move as torch's do.
        """
        training = self.training
        options = (
            training, activation, self.channel_dim, self.num_features, self.momentum is None, self.correction,
            self.ghost_batch_size, self._renorm, self.skip_nonfinite,
        )  # fmt: skip
        if not is_dynamo_compiling() and (choice := kept.recall(x, per_channel, residual, options)):
            return choice
        channel_dim = self._check_input(x, residual, None, None)
        if moving and not self._moves_as_torch():
            return reference, channel_dim
        kernel = choose(x, channel_dim, per_channel, residual, activation, training, training)
        if not is_compiling() and kernel is not reference:
            kept.keep(x, per_channel, residual, options, kernel, channel_dim)
        return kernel, channel_dim

    def _group(self) -> Any:
        """The process group that this forward communicates with, or None."""
        if not self.training or self.ghost_batch_size is not None:
            return None
        return distributed.group_of(self._sync)

    def _moves_as_torch(self) -> bool:
        return (
            self.momentum is not None
            and self.correction == 1
            and self.ghost_batch_size is None
            and self._renorm is None
            and not self.skip_nonfinite
        )

    def _unmoved(self, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        """Mean, variance and counter for a kernel that moves what it is given, where none are to move."""
        if mean is not None and var is not None and self.track_running_stats:
            # Run again by a checkpoint: it must save as many tensors as the first time.
            return mean.clone(), var.clone(), None
        return None, None, None

    def _forward_any(
        self,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        channel_dim: int,
        group: Any,
        activation: str | None,
    ) -> Tensor:
        tensors = x, self.weight, self.bias, self.running_mean, self.running_var
        options: dict[str, Any] = {
            "eps": self.eps,
            "activation": activation,
            "residual": residual,
            "mask": mask,
            "renorm": self._renorm if self.training else None,
            "channel_dim": channel_dim,
        }
        moments: Moments | None
        try:
            if group is not None:
                y, moments = synchronised.normalize(*tensors, group, self, **options)
            else:
                y, moments = functional.normalize(
                    *tensors,
                    training=self._by_batch(),
                    ghost_batch_size=self.ghost_batch_size if self.training else None,
                    **options,
                )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{describe(self)}: {error}") from None
        if (
            moments is not None
            and self.running_mean is not None
            and running.moves(self.training, self.track_running_stats)
        ):
            self._move_statistics(moments)
        return y

    def _by_batch(self) -> bool:
        return self.training or (self.running_mean is None and self.running_var is None)

    @torch.no_grad()
    def _move_statistics(self, moments: Moments) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var, moved = running.moved(
            self.running_mean,
            self.running_var,
            moments,
            factor=running.averaging_factor(self.momentum, self.num_batches_tracked, moments.mean.dtype),
            correction=self.correction,
            skip_nonfinite=self.skip_nonfinite,
        )
        try:
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(moved)
        except RuntimeError as error:
            if not under_transform():
                raise
            raise RuntimeError(
                f"{describe(self)}: a torch.func transform cannot write running statistics into buffers that "
                "it was not given. Leave them where they are with bn.hold(model), call bn.batch_norm, which "
                "returns them, or transform over the buffers too (torch.func.functional_call)"
            ) from error

    def _check_input(self, x: Tensor, residual: Tensor | None, mask: Tensor | None, group: Any) -> int:
        if (
            # Most inputs are plainly right; seeing it here saves a small layer a tenth of its time.
            mask is None
            and self.channel_dim == 1
            and self.ghost_batch_size is None
            and isinstance(x, Tensor)
            and len(shape := x.shape) in self._ranks
            and shape[1] == self.num_features
            and x.numel() > self.num_features
            and x.is_floating_point()
            and (residual is None or (isinstance(residual, Tensor) and residual.shape == shape))
        ):
            return 1
        try:
            self._check_rank(x)
            channel_dim = functional.check_input(
                x,
                self.channel_dim,
                self._by_batch() and group is None,  # a process may have few values if others have more
                residual,
                mask,
                self.ghost_batch_size if self.training else None,
            )
            if x.shape[channel_dim] != self.num_features:
                raise ValueError(
                    f"expected {self.num_features} channels (num_features) along dimension {channel_dim}, "
                    f"got {x.shape[channel_dim]} in an input of shape {tuple(x.shape)}. Channels elsewhere? "
                    "Say so with channel_dim"
                )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{describe(self)}: {error}") from None
        return channel_dim

    def _check_rank(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and x.ndim not in self._ranks:
            raise ValueError(
                f"expected {self._expected} input, got {x.ndim}D input of shape {tuple(x.shape)}"
            )

    def __getattr__(self, name: str) -> Any:
        if name == "running_mean" and not is_compiling():
            check_reader(self._options_lost)
        return super().__getattr__(name)

    def _options_lost(self, library: str) -> dict[str, Any]:
        """What is lost where a module of this name takes a layer for one of torch.nn's."""
        return {name: value for name, value in self._changed_options().items() if name != "sync"}

    def _changed_options(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in _OPTIONS}
        options["sync"] = self._sync  # whose repr of a group is its ranks
        return {name: value for name, value in options.items() if value != _OPTIONS[name]}

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"{describe(self)}: torch.jit.script cannot compile this package's layers: export the model with "
            "torch.export, or bn.revert(model) first, which gives torch.nn's layers back"
        )

    def extra_repr(self) -> str:
        changed = [f"{name}={value!r}" for name, value in self._changed_options().items()]
        return ", ".join([super().extra_repr(), *changed])


def _is_constant(tensor: Tensor | None) -> bool:
    return tensor is not None and not tensor.requires_grad


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):  # noqa: D101
    __doc__ = f"(N, C) or (N, C, L) inputs. {inspect.getdoc(_BatchNorm)}"
    _ranks, _expected = (2, 3), "2D (N, C) or 3D (N, C, L)"


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):  # noqa: D101
    __doc__ = f"(N, C, H, W) inputs. {inspect.getdoc(_BatchNorm)}"
    _ranks, _expected = (4,), "4D (N, C, H, W)"


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):  # noqa: D101
    __doc__ = f"(N, C, D, H, W) inputs. {inspect.getdoc(_BatchNorm)}"
    _ranks, _expected = (5,), "5D (N, C, D, H, W)"


class _LazyBatchNorm(_BatchNorm):
    """Learns `num_features` from its first input, and becomes the class without "Lazy" in its name.

    Same arguments as that class, less `num_features`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        own = {name: options.pop(name, default) for name, default in _OPTIONS.items()}
        # Past _BatchNorm, whose first argument is the num_features that is not known yet.
        super(_BatchNorm, self).__init__(*args, **options)
        self._set_options(**own)

    def initialize_parameters(
        self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """Make Parameters and buffers for the channels of `x`."""
        if self.num_features == 0:
            try:
                self._check_rank(x)
                channel_dim = checks.resolve_channel_dim(x, self.channel_dim)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{describe(self)}: {error}") from None
            super().initialize_parameters(x.movedim(channel_dim, 1))  # type: ignore[misc]
            # torch's leaves it at 0 where there is nothing to make, or a checkpoint has made it already.
            made = [tensor for tensor in (self.weight, self.running_mean) if tensor is not None]
            self.num_features = made[0].shape[0] if made else x.shape[channel_dim]


class LazyBatchNorm1d(_LazyBatchNorm, nn.LazyBatchNorm1d):  # noqa: D101
    __doc__ = inspect.getdoc(_LazyBatchNorm)
    cls_to_become = BatchNorm1d
    _ranks, _expected = BatchNorm1d._ranks, BatchNorm1d._expected


class LazyBatchNorm2d(_LazyBatchNorm, nn.LazyBatchNorm2d):  # noqa: D101
    __doc__ = inspect.getdoc(_LazyBatchNorm)
    cls_to_become = BatchNorm2d
    _ranks, _expected = BatchNorm2d._ranks, BatchNorm2d._expected


class LazyBatchNorm3d(_LazyBatchNorm, nn.LazyBatchNorm3d):  # noqa: D101
    __doc__ = inspect.getdoc(_LazyBatchNorm)
    cls_to_become = BatchNorm3d
    _ranks, _expected = BatchNorm3d._ranks, BatchNorm3d._expected
