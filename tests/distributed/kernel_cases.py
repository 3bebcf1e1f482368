"""What a set of processes checks about the compiled kernels around the all-reduces of synchronised layers."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm import synchronised
from batchnorm.kernels import cpu, reference
from tests.distributed.cases import SPLITS, C, assert_near, case, parameters_of, parts, recorded
from tests.distributed.matching_cases import matching

MAP = (C, 64, 64)
SMALL, LARGE, NONE = (3, C, 2, 2), (3, *MAP), (0, C, 2, 2)
DOUBLE: dict[str, Any] = {"dtype": torch.float64, "parameter_dtype": torch.float64, "rtol": 1e-12}

# Means and gradients of weights are sums of 30,000 terms and more that cancel but for a hundredth.
SUMS: dict[str, Any] = {"offset": 0.5, "rtol": 3e-6}

matching("large_short_runs", 2, shape=(C, 7, 7), samples_each=60, activation="silu", **SUMS)
matching(
    "large_rows", 2, kind=bn.BatchNorm1d, shape=(C,), samples_each=2500, layouts=("contiguous",),
    activation="relu", **SUMS,
)  # fmt: skip
matching("large_residual", 2, 3, shape=MAP, activation="relu", residual=True, **SUMS)
matching("large_silu_far_from_zero", 2, shape=MAP, activation="silu", residual=True, offset=1e4)
matching("large_residual_alone", 2, shape=MAP, residual=True, **SUMS)
matching("large_softplus", 2, shape=MAP, activation="softplus", residual=True, **SUMS)
matching("large_not_affine", 2, shape=MAP, affine=False, activation="gelu", **SUMS)
matching("large_cumulative", 2, shape=MAP, momentum=None, activation="relu", **SUMS)
matching("large_float64", 2, shape=MAP, activation="silu", residual=True, **DOUBLE)
# By torch, whatever the size.
matching("large_renorm", 2, shape=MAP, activation="relu", renorm=(1.1, 0.1), **SUMS)
matching(
    "large_masked",
    2,
    shape=MAP,
    activation="relu",
    mask=lambda x: torch.rand(len(x), 1, 64, 64) > 0.3,
    **SUMS,
)


@contextlib.contextmanager
def halves_that_run() -> Iterator[list[str]]:
    """Names of the kernels' halves that are called inside."""
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("statistics", "apply", "backward_sums", "backward_apply"):
            half = getattr(cpu, name)

            def noted(*args: Any, _name: str = name, _half: Any = half, **options: Any) -> Any:
                called.append(_name)
                return _half(*args, **options)

            patch.setattr(cpu, name, noted)
        yield called


@case(2)
def kernels_run_where_they_are_worth_it() -> None:
    """Around the same all-reduces, so that batches may be large, small and empty at the same time."""
    for shapes in ((LARGE, LARGE), (LARGE, SMALL), (SMALL, LARGE), (LARGE, NONE), (SMALL, SMALL)):
        shape = shapes[dist.get_rank()]
        layer = bn.BatchNorm2d(C, sync=True, activation="relu")
        with halves_that_run() as halves, recorded() as calls:
            layer(torch.randn(shape, requires_grad=True)).sum().backward()
        assert calls == [(torch.float64, (2 * C + 1) * 8), (torch.float64, 2 * C * 8)]
        wanted = ["statistics", "apply", "backward_sums", "backward_apply"] if shape == LARGE else []
        assert halves == wanted, shapes


@contextlib.contextmanager
def kernels_on(*ranks: int) -> Iterator[None]:
    """Inside, these ranks take the kernels for batches of any size, the others for none."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() in ranks:
            patch.setattr(cpu, "pays", lambda *call: True)
        else:
            patch.setattr(synchronised, "choose", lambda *call: reference)
        yield


@case(2)
def gradients_of_some_inputs() -> None:
    """Communication is for that of x, and for nothing else."""
    everything = ("x", "residual", "weight", "bias")
    for wanted, activation in itertools.product(
        (("x",), ("weight", "bias"), ("residual",), ("bias",), ("x", "residual"), everything),
        ("relu", "silu", None),
    ):
        found = []
        for ranks in ((), (0,), (0, 1)):
            torch.manual_seed(dist.get_rank())
            layer = bn.BatchNorm2d(C, sync=True, activation=activation).double()
            x, residual, grad = torch.randn(3, 4, C, 5, 3, dtype=torch.float64)
            leaves = {"x": x, "residual": residual, **dict(layer.named_parameters())}
            for name, leaf in leaves.items():
                leaf.requires_grad_(name in wanted)
            asked = [leaves[name] for name in wanted]
            with kernels_on(*ranks), recorded() as calls:
                y = layer(x, residual)
                gradients = torch.autograd.grad(y, asked, grad, retain_graph=True)
                again = torch.autograd.grad(y, asked, grad)
            assert_close(again, gradients, rtol=0, atol=0)
            assert len(calls) == (3 if "x" in wanted else 1)
            found.append((y, gradients))
        assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
        assert_close(found[2], found[0], rtol=1e-10, atol=1e-10)


@case(2, 3)
def double_backward_after_kernels() -> None:
    """The gradients of a gradient penalty are those of the oracle, whoever has run kernels forward."""
    for sizes, activation, with_residual, ranks in itertools.product(
        SPLITS[dist.get_world_size()], ("silu", "leaky_relu", None), (False, True), ((0, 1, 2), (1,))
    ):
        what = f"{sizes} {activation} {with_residual} {ranks}"
        torch.manual_seed(1)
        options: dict[str, Any] = {"activation": activation, "dtype": torch.float64}
        one, ours = bn.BatchNorm1d(C, **options), bn.BatchNorm1d(C, sync=True, **options)
        parameters_of(one)
        ours.load_state_dict(one.state_dict())
        x, shortcut = torch.randn(2, sum(sizes), C, 3, dtype=torch.float64)
        wanted = penalty_gradients(one, x, shortcut if with_residual else None)
        with kernels_on(*ranks), recorded() as calls:
            got = penalty_gradients(ours, parts(x, sizes), parts(shortcut, sizes) if with_residual else None)
        assert [size for _, size in calls] == [(2 * C + 1) * 8] + 3 * [2 * C * 8]
        for ours_order, one_order in zip(got, wanted, strict=True):
            of_inputs = 1 + with_residual
            for mine, whole in zip(ours_order[:of_inputs], one_order[:of_inputs], strict=True):
                assert_near(mine, parts(whole, sizes), 1e-9, f"{what} inputs")
            for mine, whole in zip(ours_order[of_inputs:], one_order[of_inputs:], strict=True):
                total = mine.detach().clone()
                dist.all_reduce(total)
                assert_near(total, whole, 1e-9, f"{what} parameters")


def penalty_gradients(layer: nn.Module, x: torch.Tensor, shortcut: torch.Tensor | None) -> Any:
    """Gradients of a loss, and those of a penalty of them and of the output."""
    inputs = [tensor.clone().requires_grad_() for tensor in (x, shortcut) if tensor is not None]
    y = layer(*inputs)
    asked = (*inputs, *layer.parameters())
    first = torch.autograd.grad(y.pow(3).sum(), asked, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first[: len(inputs)]) + y.square().sum()
    return first, torch.autograd.grad(penalty, asked)


@case(2)
def a_step_between_forward_and_backward() -> None:
    """What a backward needs of weight and bias is as it was, or there is an error."""
    torch.manual_seed(dist.get_rank())
    layer, x = bn.BatchNorm2d(C, sync=True, activation="silu"), torch.randn(LARGE, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


@case(2)
def nothing_of_the_size_of_x_is_kept_besides_x() -> None:
    for activation, with_residual, kept in (("silu", False, "x"), ("relu", True, "xy"), ("silu", True, "xr")):
        x, residual = torch.randn(2, *LARGE).unbind()
        x.requires_grad_()
        layer = bn.BatchNorm2d(C, sync=True, activation=activation)
        y = layer(x, residual if with_residual else None)
        wanted = {"x": x, "y": y, "r": residual}
        saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.numel() == x.numel()]
        assert [t.data_ptr() for t in saved] == [wanted[name].data_ptr() for name in kept]


@case(2)
def compiled_around_kernels() -> None:
    torch.manual_seed(dist.get_rank())
    layer, x = bn.BatchNorm2d(C, sync=True, activation="relu"), torch.randn(LARGE)
    found = []
    for network in (layer, torch.compile(layer, backend="eager")):
        inputs = x.clone().requires_grad_()
        with recorded() as calls, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler hides its own, which as an error it cannot
            y = network(inputs)
            y.square().sum().backward()
        assert [size for _, size in calls] == [(2 * C + 1) * 8, 2 * C * 8]
        found.append((y, inputs.grad))
    assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
