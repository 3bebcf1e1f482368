"""One normalisation by the CPU kernels, and what those share that are alike."""

from __future__ import annotations

import torch
from torch import Tensor, empty_like

from batchnorm.kernels import autograd
from batchnorm.kernels.autograd import in_layout_of
from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu import launch
from batchnorm.kernels.cpu.pages import in_huge_pages
from batchnorm.kernels.cpu.plan import COSTLY, Plan, plan_of


class Call(autograd.Call):
    """A normalisation by the CPU kernels."""

    __slots__ = ("plan", "running", "statistics", "table")

    def __init__(
        self,
        x: Tensor,
        channel_dim: int,
        statistics: int,
        eps: float,
        activation: str | None,
        residual: Tensor | None,
    ) -> None:
        super().__init__(channel_dim, statistics == f.OF_BATCH, eps, activation, residual)
        the_plan = plan_of(x, channel_dim)
        assert the_plan is not None  # by `supports`
        self.plan = the_plan
        self.overwrites = the_plan.is_large
        self.statistics = statistics
        # Addresses of the running mean, variance and counter, and the momentum.
        self.running = (0, 0, 0, 0.0)

    def another(self, eps: float) -> Call:
        """For tensors that are like those of this one, which never runs."""
        call = Call.__new__(Call)
        call.channel_dim, call.by_batch, call.eps = self.channel_dim, self.by_batch, eps
        call.activation, call.unfused, call.slope_from = self.activation, self.unfused, self.slope_from
        call.bits, call.offers, call.overwrites = None, self.offers, self.overwrites
        call.plan, call.statistics, call.running = self.plan, self.statistics, self.running
        return call

    def move(
        self,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float,
    ) -> None:
        """Let `forward` move these, where they are given."""
        if running_mean is None or running_var is None:
            return
        seen, counter = num_batches_tracked, 0
        if type(seen) is Tensor and seen.is_cpu and seen.dtype is torch.int64 and seen.numel() == 1:
            counter = seen.data_ptr()
        elif seen is not None:
            seen.add_(1)
        self.running = running_mean.data_ptr(), running_var.data_ptr(), counter, momentum

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """The output; the table has what it was normalised by."""
        the_plan, y = self.plan, new_like(x, self.plan)
        if self.statistics != f.OF_TABLE:
            self.table = empty_like(the_plan.table)
        launch.run_forward(
            the_plan, self.table, x, y, residual, self.statistics, the_plan.count, weight, bias,
            self.running, self.eps, self.activation, self.bits,
        )  # fmt: skip
        return y

    def prepare_again(self) -> None:
        """Let `forward` normalise by the table that it has left, and move nothing."""
        self.statistics, self.running = f.OF_TABLE, (0, 0, 0, 0.0)

    def leave_bits(self) -> None:
        """Let `forward` leave bits instead of the output, where the plan has them."""
        if self.plan.words > 0:
            self.slope_from = "bits"
            self.bits = empty_like(self.plan.bits)

    def with_slope_of_output(self, x: Tensor, extra: Tensor) -> Tensor:
        """The output, or 1 where its bit is set, else -1."""
        if self.slope_from != "bits":
            return super().with_slope_of_output(x, extra)
        samples, channels, positions, *_ = self.plan.geometry
        places = torch.arange(f.WORD, dtype=torch.int32, device="cpu")
        bits = (extra.view(samples, channels, -1, 1) >> places & 1).flatten(2)[..., :positions]
        return (bits * 2 - 1).to(x.dtype).reshape(x.shape)

    def mean_and_invstd(self) -> tuple[Tensor, Tensor]:
        """What `forward` has normalised by, per channel."""
        return self.table[f.MEAN], self.table[f.INVSTD]

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        extra: Tensor | None,
        wanted: tuple[bool, ...],
        may_overwrite: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and residual, one of which is written over grad_y if it may be."""
        the_plan, activation, by_batch = self.plan, self.activation, self.by_batch
        wants_x, wants_weight, wants_bias, wants_residual = wanted
        given, grad_y = grad_y, in_layout_of(x, grad_y)
        overwrites = may_overwrite or grad_y is not given
        grad_x = None
        if wants_x:
            # Where the residual's gradient is wanted, it has the memory of grad_y.
            grad_x = grad_y if overwrites and not wants_residual else new_like(x, the_plan)
        grad_weight = empty_like(the_plan.parameter) if wants_weight else None
        grad_bias = empty_like(the_plan.parameter) if wants_bias else None
        grad_z = grad_residual = None
        if wants_residual:
            grad_residual = grad_y if overwrites or activation is None else new_like(x, the_plan)
            grad_z = None if activation is None else grad_residual
        elif wants_x and activation in COSTLY:
            grad_z = grad_x
        reduces = by_batch or wants_weight or wants_bias or grad_z is not None
        if reduces or wants_x:
            launch.run_backward(
                the_plan, self.table, x, extra, grad_y, grad_x, grad_z, grad_weight, grad_bias,
                None, None, by_batch, reduces, activation, self.slope_from,
            )  # fmt: skip
        return grad_x, grad_weight, grad_bias, grad_residual


class Ready:
    """The kernels for calls that are alike, with all that is found once for them.

    In the place of the module `cpu` for those who know that their call is: see `choice`.
    """

    def __init__(
        self, x: Tensor, channel_dim: int, activation: str | None, residual: Tensor | None, training: bool
    ) -> None:
        self._call = Call(x, channel_dim, f.OF_BATCH if training else f.RUNNING, 0.0, activation, residual)

    def training_and_moving(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float,
        eps: float,
        channel_dim: int,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As `cpu.training_and_moving`."""
        call = self._call.another(eps)
        call.move(running_mean, running_var, num_batches_tracked, momentum)
        return call.run(x, weight, bias, residual)

    def inference(
        self,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        eps: float,
        channel_dim: int,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As `cpu.inference`."""
        call = self._call.another(eps)
        call.running = running_mean.data_ptr(), running_var.data_ptr(), 0, 0.0
        return call.run(x, weight, bias, residual)


def new_like(x: Tensor, the_plan: Plan) -> Tensor:
    """New memory for a tensor like x."""
    y = empty_like(x)
    return in_huge_pages(y) if the_plan.is_large else y
