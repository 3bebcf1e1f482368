"""What processes check about torch around a layer: checkpoints, second derivatives, compile, autocast."""

import copy
import itertools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from tests.distributed.cases import SPLITS, C, assert_near, case, parameters_of, parts, recorded


@case(2, 3)
def double_backward() -> None:
    """The gradients of a gradient penalty are those of the oracle on one process."""
    for sizes, mask, renorm in itertools.product(
        SPLITS[dist.get_world_size()], (False, True), (None, (1.2, 0.3))
    ):
        torch.manual_seed(1)
        options: dict[str, Any] = {"activation": "silu", "renorm": renorm, "dtype": torch.float64}
        one, ours = bn.BatchNorm1d(C, **options), bn.BatchNorm1d(C, sync=True, **options)
        parameters_of(one)
        ours.load_state_dict(one.state_dict())
        x = torch.randn(sum(sizes), C, 3, dtype=torch.float64)
        weights = torch.rand(len(x), 1, 3, dtype=torch.float64) if mask else None
        found = []
        for layer, inputs, its_weights in (
            (one, x.clone(), weights),
            (ours, parts(x, sizes), None if weights is None else parts(weights, sizes)),
        ):
            inputs.requires_grad_()
            # y enters the loss beside its own gradient, so that both kinds of second derivative add up.
            y = layer(inputs, mask=its_weights)
            asked = (inputs, *layer.parameters())
            first = torch.autograd.grad(y.pow(3).sum(), asked, create_graph=True)
            penalty = first[0].square().sum() + y.square().sum()
            found.append((first, torch.autograd.grad(penalty, asked)))
        for ours_order, one_order in zip(found[1], found[0], strict=True):
            assert_near(ours_order[0], parts(one_order[0], sizes), 1e-9, f"{sizes} {mask} {renorm} x")
            for got, wanted in zip(ours_order[1:], one_order[1:], strict=True):
                total = got.detach().clone()
                dist.all_reduce(total)
                assert_near(total, wanted, 1e-9, f"{sizes} {mask} {renorm} parameters")


@case(2)
def hold_and_checkpoint() -> None:
    for use_reentrant in (True, False):
        torch.manual_seed(dist.get_rank())
        model = nn.Sequential(
            nn.Linear(C, C), bn.BatchNorm1d(C, sync=True, activation="silu"), nn.Linear(C, C)
        )
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
        plain, x = copy.deepcopy(model), torch.randn(4, C)
        plain(x).square().sum().backward()
        with recorded() as calls:
            checkpoint(
                model, x.clone().requires_grad_(), use_reentrant=use_reentrant
            ).square().sum().backward()
        assert [size for _, size in calls] == [(2 * C + 1) * 8] * 2 + [2 * C * 8]
        assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
        for ours, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            assert_close(ours.grad, wanted.grad, rtol=0, atol=0)
        with bn.hold(model):
            model(x)
        assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


@case(2)
def memory_efficient_builds_outputs_again() -> None:
    for activation, residual, renorm in (
        ("relu", False, None),
        ("silu", True, None),
        (None, False, (1.1, 0.1)),
    ):
        torch.manual_seed(dist.get_rank())
        norm = bn.BatchNorm2d(C, sync=True, activation=activation, renorm=renorm)
        model = Residual(norm, residual).double()  # small inputs go by torch, recipes' by kernels
        lean = bn.memory_efficient(copy.deepcopy(model))
        x = torch.randn(3, C, 6, 6, dtype=torch.float64)
        found = []
        for network in (model, lean):
            with recorded() as calls:
                y = network(x)
                kept = not network.output.expired()
                network.norm.bias.data.add_(1)  # as a step before the backward pass, of which y is no part
                y.square().sum().backward()
            assert len(calls) == 2
            found.append((kept, y, [p.grad for p in network.parameters()]))
        assert [kept for kept, *_ in found] == [True, False]
        assert_close(found[1][1:], found[0][1:])
        penalties = []
        for network in (model, lean):
            inputs = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(network(inputs).pow(3).sum(), inputs, create_graph=True)
            penalties.append(torch.autograd.grad(first.square().sum(), (inputs, *network.parameters()))[:-1])
        assert_close(penalties[1], penalties[0])


class Residual(nn.Module):
    """Convolution, batch norm, convolution; knows whether the batch norm's output is still in memory."""

    def __init__(self, norm: nn.Module, residual: bool) -> None:
        super().__init__()
        self.norm, self.residual = norm, residual
        self.before, self.after = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.before(x), x if self.residual else None)
        self.output = StorageWeakRef(y.untyped_storage())
        return self.after(y)


@case(2)
def compiled() -> None:
    # The collective is left to eager torch, by a graph break.
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(bn.BatchNorm1d(C, sync=True, activation="relu"), nn.Linear(C, C))
    twin, x = copy.deepcopy(model), torch.randn(4, C, requires_grad=True)
    compiled_model = torch.compile(model, backend="eager")
    counters.clear()
    for network in (compiled_model, twin):
        with recorded() as calls, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler hides its own, which as an error it cannot
            network(x).square().sum().backward()
        assert [size for _, size in calls] == [(2 * C + 1) * 8, 2 * C * 8]
    assert counters["stats"]["unique_graphs"] > 0  # else nothing was compiled
    for ours, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(ours.grad, wanted.grad)
    assert_close(model.state_dict(), twin.state_dict())


@case(2)
def lazy() -> None:
    layer = bn.LazyBatchNorm1d(sync=True)
    layer(torch.full((1, C), float(dist.get_rank())))
    assert type(layer) is bn.BatchNorm1d
    assert layer.sync is True
    assert_close(layer.running_mean, torch.full((C,), 0.05))


@case(2)
def mixed_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C, sync=True))
    one, x = copy.deepcopy(model), torch.randn(12, C)
    one[1].sync = False
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = model(parts(x, [6, 6])), one(x)
    assert y.dtype == torch.bfloat16
    assert_near(y, parts(wanted, [6, 6]), 2**-8, "y")
    y.float().pow(3).sum().backward()
    wanted.float().pow(3).sum().backward()
    for ours, theirs in zip(model.parameters(), one.parameters(), strict=True):
        assert ours.grad.dtype == ours.dtype == torch.float32
        dist.all_reduce(ours.grad)
        largest = max(float(p.grad.abs().max()) for p in one.parameters())
        assert (ours.grad - theirs.grad).abs().max() <= 2**-6 * largest
