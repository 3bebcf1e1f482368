"""What a set of processes checks together: k processes give the numbers of one."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm as bn
from tests.distributed.cases import CASES, SPLITS, C, assert_near, parameters_of, parts


def matching(name: str, *on: int, **settings: Any) -> None:
    """Register: k processes give the numbers of one."""
    CASES[name] = lambda: assert_matches_one_process(**settings), on


def samples(
    shape: tuple[int, ...],
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> Tensor:
    x = (torch.randn(shape) + offset).to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def assert_matches_one_process(
    *,
    kind: type[nn.Module] = bn.BatchNorm2d,
    shape: tuple[int, ...] = (C, 4, 3),
    layouts: tuple[str, ...] = ("contiguous", "channels_last"),
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    residual: bool = False,
    mask: Callable[[Tensor], Tensor] | None = None,
    rtol: float = 1e-6,
    steps: int = 2,
    samples_each: int = 1,
    parameter_dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Against float64 on one process, which is given the same numbers: outputs, gradients, statistics.

    `samples_each` is how many stand for each of those in SPLITS.
    """
    for split, layout in itertools.product(SPLITS[dist.get_world_size()], layouts):
        sizes = [samples_each * count for count in split]
        torch.manual_seed(sum(sizes))
        what = f"{sizes} {layout}"
        ours = kind(C, sync=True, **options)
        parameters_of(ours)
        one = kind(C, **options).double()
        one.load_state_dict(ours.state_dict())
        if parameter_dtype is not None:
            ours.to(parameter_dtype)
        for _ in range(steps):
            ours.zero_grad()
            one.zero_grad()
            x = samples((sum(sizes), *shape), offset, dtype, layout)
            shortcut = samples(x.shape, 0, dtype, layout) if residual else None
            weights = None if mask is None else mask(x)
            grad = samples(x.shape, 0.5, dtype, layout)

            whole = x.double().requires_grad_()
            whole_shortcut = None if shortcut is None else shortcut.double().requires_grad_()
            wanted = one(whole, whole_shortcut, weights)
            wanted.backward(grad.double())

            part = parts(x, sizes).requires_grad_()
            part_shortcut = None if shortcut is None else parts(shortcut, sizes).requires_grad_()
            y = ours(part, part_shortcut, None if weights is None else parts(weights, sizes))
            assert y.dtype == dtype
            if layout == "channels_last" and len(part) > 1:
                assert y.is_contiguous(memory_format=torch.channels_last)
            y.backward(parts(grad, sizes))

            assert_near(y, parts(wanted, sizes), rtol, f"{what} y")
            assert_near(part.grad, parts(whole.grad, sizes), rtol, f"{what} gradient of x")
            if part_shortcut is not None and whole_shortcut is not None:
                assert_near(part_shortcut.grad, parts(whole_shortcut.grad, sizes), rtol, f"{what} residual's")
            for (name, ours_p), one_p in zip(ours.named_parameters(), one.parameters(), strict=True):
                total = ours_p.grad.double()
                dist.all_reduce(total)
                assert_near(total, one_p.grad, rtol, f"{what} gradient of {name}")
        for name, buffer in ours.named_buffers():
            assert_near(buffer, one.get_buffer(name), max(rtol, 2e-7), f"{what} {name}")


matching("plain", 2, 3, 4)
matching("far_from_zero", 2, 3, 4, offset=1e4)
# Large enough for the compiled kernels.
matching("large", 2, shape=(C, 64, 64), activation="relu")
matching("large_far_from_zero", 2, shape=(C, 64, 64), offset=1e4)
matching("rows", 2, kind=bn.BatchNorm1d, shape=(C,), layouts=("contiguous",))
matching("sequences", 2, kind=bn.BatchNorm1d, shape=(C, 7), layouts=("contiguous",))
matching("volumes", 2, kind=bn.BatchNorm3d, shape=(C, 2, 3, 2), layouts=("contiguous",))
matching("channels_at_the_end", 2, kind=bn.BatchNorm1d, shape=(7, C), layouts=("contiguous",), channel_dim=-1)
matching("activation_relu", 2, activation="relu")
matching("activation_silu_far_from_zero", 2, activation="silu", offset=1e4)
matching("residual", 2, 3, 4, activation="relu", residual=True)
matching("not_affine", 2, affine=False)
matching("cumulative", 2, 3, 4, momentum=None)
matching("biased", 2, correction=0)
matching("without_running_statistics", 2, track_running_stats=False)
matching("renorm", 2, 3, 4, renorm=(1.1, 0.1))
matching("skip_nonfinite", 2, skip_nonfinite=True)
matching("mask", 2, mask=lambda x: torch.rand(len(x), 1, *x.shape[2:]) > 0.3)
matching("mask_far_from_zero", 2, 3, 4, offset=1e4, mask=lambda x: torch.rand(len(x), 1, *x.shape[2:]) > 0.3)
matching("mask_of_weights", 2, mask=lambda x: torch.rand(len(x), 1, 1, 1) * 2)
matching("mask_per_channel", 2, 3, 4, mask=lambda x: torch.rand(x.shape) > 0.4)
# Statistics and sums are in float32: what is left is the rounding of outputs and gradients to the input's
# dtype, half a unit in the last place of each, and of an activation's input before it.
matching("bfloat16", 2, 3, 4, dtype=torch.bfloat16, rtol=2**-8)
matching("bfloat16_relu", 2, dtype=torch.bfloat16, activation="relu", rtol=2**-7)
matching("float16", 2, dtype=torch.float16, residual=True, rtol=2**-10)
matching("float64", 2, dtype=torch.float64, parameter_dtype=torch.float64, rtol=1e-12)
