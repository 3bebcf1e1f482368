"""What a set of processes checks together about synchronised layers, and what the other files check with."""

import contextlib
import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.lab.nets import LeNet
from batchnorm.model import merge_running_statistics

C = 5
# Samples on each process: even, uneven, none.
SPLITS: dict[int, list[list[int]]] = {
    2: [[4, 4], [5, 2], [1, 6], [0, 6]],
    3: [[2, 2, 2], [4, 1, 3], [0, 7, 0]],
    4: [[2, 2, 2, 2], [3, 0, 1, 5]],
}
CASES: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {}


def case(*on: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a case for sets of these many processes."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        CASES[function.__name__] = function, on
        return function

    return register


def matching(name: str, *on: int, **settings: Any) -> None:
    """Register: k processes give the numbers of one."""
    CASES[name] = lambda: assert_matches_one_process(**settings), on


# Set by `run`: groups of this process alone, and of the first two.
ALONE: Any = None
PAIR: Any = None


# Largest error found by the case that is running, relative to the largest value; for the log.
worst = 0.0


@torch.no_grad()
def assert_near(got: Tensor, wanted: Tensor, rtol: float, what: str) -> None:
    """Errors are relative to the largest value: a sum's rounding is as large as its largest term's."""
    global worst
    assert got.shape == wanted.shape, f"{what}: {got.shape} instead of {wanted.shape}"
    if wanted.numel() == 0:
        return
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)
    worst = max(worst, float(error))
    assert float(error) <= rtol, f"{what}: relative error {float(error):.2e}, not within {rtol:.0e}"


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


def parts(x: Tensor, sizes: list[int]) -> Tensor:
    """This process's samples of the whole batch."""
    return x.split(sizes)[dist.get_rank()].detach().clone()


def parameters_of(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)


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


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[torch.dtype, int]]]:
    """The dtype and bytes of every all-reduce inside; any other collective fails."""
    calls: list[tuple[torch.dtype, int]] = []
    real = {name: getattr(dist, name) for name in COLLECTIVES}

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((tensor.dtype, tensor.numel() * tensor.element_size()))
        return real["all_reduce"](tensor, *args, **options)

    def other(*args: Any, **options: Any) -> Any:
        raise AssertionError("a collective that is not an all-reduce")

    try:
        for name in COLLECTIVES:
            setattr(dist, name, all_reduce if name == "all_reduce" else other)
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor",
    "reduce_scatter", "broadcast", "broadcast_object_list", "gather", "scatter", "barrier", "send", "recv",
    "reduce",
)  # fmt: skip


@case(2, 3, 4)
def one_all_reduce_each_way() -> None:
    layer = bn.BatchNorm2d(C, sync=True, activation="relu")
    x = torch.randn(3, C, 2, 2, requires_grad=True)
    with recorded() as calls:
        y = layer(x)
        assert calls == [(torch.float64, (2 * C + 1) * 8)]
        y.sum().backward()
    assert calls == [(torch.float64, (2 * C + 1) * 8), (torch.float64, 2 * C * 8)]


@case(2)
def counts_per_channel_take_c_more_numbers() -> None:
    layer = bn.BatchNorm1d(C, sync=True)
    with recorded() as calls:
        layer(torch.randn(4, C), mask=torch.ones(4, C))
        layer(torch.randn(4, C), mask=torch.ones(4, 1))
    assert [size for _, size in calls] == [3 * C * 8, (2 * C + 1) * 8]


@case(2)
def what_lies_under_a_mask_spoils_no_gradient() -> None:
    torch.manual_seed(dist.get_rank())
    x, residual, mask = torch.randn(4, C, 6), torch.randn(4, C, 6), torch.rand(4, 1, 6) > 0.4
    for padding, activation in itertools.product((math.nan, -math.inf), (None, "silu")):
        layer = bn.BatchNorm1d(C, sync=True, activation=activation)
        found = []
        for filling in (0.0, padding) if dist.get_rank() == 0 else (0.0, 0.0):  # on one process
            leaves = [x.where(mask, filling).requires_grad_(), residual.clone().requires_grad_()]
            y = layer(*leaves, mask=mask)
            assert torch.equal(y.isfinite(), mask.expand_as(y) | (filling == 0))
            leaves += layer.parameters()
            loss = y.where(mask, 0).pow(3).sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(first[0].where(mask, 0).pow(2).sum(), [*leaves[:1], layer.weight])
            found.append([*first, *second])
        assert_close(found[1], found[0])


@case(2)
def a_mask_on_some_processes() -> None:
    layer = bn.BatchNorm1d(C, sync=True, momentum=None, correction=0)
    x = torch.arange(6.0)[:, None].expand(6, C)
    if dist.get_rank() == 0:
        layer(x, mask=torch.tensor([1, 1, 0, 0, 0, 0])[:, None])
    else:
        layer(x[4:])
    assert_close(layer.running_mean, torch.full((C,), 2.5))


@case(1, 2)
def no_communication() -> None:
    torch.manual_seed(dist.get_rank())
    x = torch.randn(8, C)
    quiet = {
        "eval": bn.BatchNorm1d(C, sync=True).eval(),
        "eval without statistics": bn.BatchNorm1d(C, sync=True, track_running_stats=False).eval(),
        "ghost": bn.BatchNorm1d(C, sync=True, ghost_batch_size=4),
        "ghost of the whole batch": bn.BatchNorm1d(C, sync=True, ghost_batch_size=8),
        "off": bn.BatchNorm1d(C),
        "a group of one": bn.BatchNorm1d(C, sync=ALONE),
    }
    if dist.get_world_size() == 1:
        quiet |= {"one process": bn.BatchNorm1d(C, sync=True)}
    for what, layer in quiet.items():
        twin = copy.deepcopy(layer)
        twin.sync = False
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        with recorded() as calls:
            y = layer(ours)
            y.square().sum().backward()
        assert calls == [], what
        wanted = twin(theirs)
        wanted.square().sum().backward()
        assert_close((y, ours.grad), (wanted, theirs.grad), rtol=0, atol=0, msg=what)
        assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0, msg=what)


@case(1)
def one_value_per_channel_on_one_process_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"more than 1 value per channel"):
        bn.BatchNorm1d(C, sync=True)(torch.randn(1, C))


@case(3)
def sub_groups() -> None:
    rank = dist.get_rank()
    layer = bn.BatchNorm1d(C, momentum=1.0, sync=PAIR if rank < 2 else ALONE)
    assert layer.sync is (PAIR if rank < 2 else ALONE)
    x = torch.arange(12.0)[:, None].expand(12, C)[4 * rank : 4 * rank + 4]
    layer(x)
    assert_close(layer.running_mean, torch.full((C,), 3.5 if rank < 2 else 9.5))
    assert "sync=<ranks [0, 1]>" in repr(layer) or rank == 2
    if rank < 2:
        assert copy.deepcopy(nn.Sequential(layer))[0].sync is PAIR
        with pytest.raises(TypeError, match=r"cannot be pickled.*sync = True"):
            pickle.dumps(layer)
    else:
        with pytest.raises(ValueError, match=r"not a member"):
            bn.BatchNorm1d(C, sync=PAIR)


@case(2)
def processes_with_few_values() -> None:
    layer = bn.BatchNorm1d(C, sync=True)
    layer(torch.randn(1, C))
    assert layer.num_batches_tracked == 1
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=r"BatchNorm1d '0': .*more than 1 value .*all processes"):
        model(torch.randn(dist.get_rank(), C))
    with pytest.raises(ValueError, match=r"BatchNorm1d '0': .*mask .*is empty"):
        Masked(layer)(torch.randn(3, C), torch.zeros(3, 1))


class Masked(nn.Sequential):
    """A model that hands its layer a mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return self[0](x, mask=mask)


@case(2, 3)
def all_empty() -> None:
    layer = bn.BatchNorm1d(C, sync=True)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(0, C, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, C)
    assert_close([p.grad for p in layer.parameters()], [torch.zeros(C)] * 2, rtol=0, atol=0)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


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
def nothing_is_read_from_a_device() -> None:
    """Where values are not to be looked at, as on a GPU, no operation waits for them."""

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(op.overloadpacket.__name__)
            return op(*args, **(kwargs or {}))

    operations: list[str] = []
    layer = bn.BatchNorm1d(C, sync=True, momentum=None, renorm=True, skip_nonfinite=True, activation="silu")
    x = torch.randn(4, C, requires_grad=True)
    waiting = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
    with Waits():
        layer(x).sum().backward()
    assert waiting & set(operations)
    operations.clear()
    with pytest.MonkeyPatch.context() as patch, Waits():
        patch.setattr("batchnorm.synchronised.values_can_be_read", lambda _: False)
        layer(x).sum().backward()
    assert "rsqrt" in operations
    assert not waiting & set(operations)


@case(2)
def an_empty_batch_in_a_network() -> None:
    torch.manual_seed(0)
    one = LeNet()
    two = DistributedDataParallel(synchronised(copy.deepcopy(one)))
    images, labels = torch.randn(6, 1, 28, 28), torch.randint(10, (6,))
    nn.functional.cross_entropy(one(images), labels, reduction="sum").backward()
    mine = slice(6) if dist.get_rank() == 0 else slice(0)
    nn.functional.cross_entropy(two(images[mine]), labels[mine], reduction="sum").backward()
    for (name, ours), wanted in zip(two.module.named_parameters(), one.parameters(), strict=True):
        # Before a batch norm a bias has no gradient but rounding.
        assert_close(
            2 * ours.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def synchronised(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, bn.BatchNorm1d | bn.BatchNorm2d):
            layer.sync = True
    return model


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
    for network in (compiled_model, twin):
        with recorded() as calls, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler hides its own, which as an error it cannot
            network(x).square().sum().backward()
        assert [size for _, size in calls] == [(2 * C + 1) * 8, 2 * C * 8]
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
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C, sync=True))
    x = torch.randn(6, C)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())


@case(2)
def transforms_and_masks_with_gradients_are_errors() -> None:
    layer = bn.BatchNorm1d(C, sync=True)
    with pytest.raises(RuntimeError, match=r"BatchNorm1d: a torch.func transform"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(4, C))
    with pytest.raises(ValueError, match=r"no gradient for its mask"):
        layer(torch.randn(4, C), mask=torch.ones(4, 1, requires_grad=True))


@case(2)
def ddp_with_two_forwards_before_one_backward() -> None:
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Conv2d(1, C, 3), bn.BatchNorm2d(C, sync=True, activation="relu", renorm=True))
    ddp = DistributedDataParallel(model)  # broadcasts buffers before each forward
    y = ddp(torch.randn(3, 1, 6, 6)).sum() + ddp(torch.randn(2, 1, 6, 6)).square().sum()
    y.backward()
    assert model[1].num_batches_tracked == 2
    assert all(p.grad.isfinite().all() for p in model.parameters())


@case(2, 3)
def merged_running_statistics_are_those_of_all_batches() -> None:
    k, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(rank)
    # Means far apart, so that their spread is most of the variance; the last process sees fewer batches.
    seen = 3 if rank < k - 1 else 1
    batches = torch.randn(seen, 16, C) * 2 + 100 * rank + 1e4
    model = nn.Sequential(
        bn.BatchNorm1d(C, momentum=None, correction=0), nn.Identity(), nn.BatchNorm1d(C), bn.BatchNorm1d(C)
    )
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    for batch in batches:
        model[0](batch)
        model[2](batch)
    counts: list[Any] = [None] * k
    dist.all_gather_object(counts, (seen, model[0].running_mean, model[0].running_var, model[2].running_var))
    untrained = copy.deepcopy(model[3].state_dict())
    assert merge_running_statistics(model) is model
    weights = torch.tensor([n for n, *_ in counts], dtype=torch.float64)[:, None] / sum(n for n, *_ in counts)
    means, variances = (torch.stack([c[i] for c in counts]).double() for i in (1, 2))
    mean = (weights * means).sum(0)
    assert_near(model[0].running_mean, mean, 1e-7, "mean")
    assert_near(model[0].running_var, (weights * (variances + (means - mean) ** 2)).sum(0), 1e-7, "var")
    assert (model[2].running_var > counts[0][3]).all()
    assert_close(model[3].state_dict(), untrained, rtol=0, atol=0)
    assert model[0].num_batches_tracked == seen
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    once = copy.deepcopy(model.state_dict())
    merge_running_statistics(model)
    assert_close(model.state_dict(), once)

    # A cumulative average goes on: after more batches and another merge it is still that of all.
    more = torch.randn(2, 16, C) + rank
    for batch in more:
        model[0](batch)
    merge_running_statistics(model)
    everything = [None] * k
    dist.all_gather_object(everything, torch.cat([batches, more]))
    assert_near(model[0].running_mean, torch.cat(everything).double().mean((0, 1)), 1e-6, "all batches")


@case(2)
def a_merge_that_fails_fails_everywhere_and_changes_nothing() -> None:
    rank = dist.get_rank()
    one_is_lazy = bn.LazyBatchNorm1d() if rank == 1 else bn.BatchNorm1d(C)
    models = {
        "differ": nn.Sequential(bn.BatchNorm1d(C), bn.BatchNorm1d(C + rank)),
        "lazy": nn.Sequential(bn.BatchNorm1d(C), one_is_lazy),
    }
    for reason, model in models.items():
        model[0](torch.randn(4, C) + rank)
        before = copy.deepcopy(model[0].state_dict())
        with pytest.raises(ValueError, match=f"merge_running_statistics.*(?i:{reason})"):
            merge_running_statistics(model)
        assert_close(model[0].state_dict(), before, rtol=0, atol=0)
    with torch.inference_mode():
        mean = torch.zeros(C)
    broken = nn.Sequential(bn.BatchNorm1d(C), bn.BatchNorm1d(C))
    for layer in broken:
        layer(torch.randn(4, C) + rank)
    broken[1].running_mean = mean  # nothing can be written into it outside of inference mode
    before = copy.deepcopy(broken.state_dict())
    with pytest.raises(RuntimeError, match="inference"):
        merge_running_statistics(broken)
    assert_close(broken.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(TypeError, match="expected a model"):
        merge_running_statistics(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="process group"):
        merge_running_statistics(broken, "gloo")


@case(1)
def a_merge_of_one_process_changes_nothing() -> None:
    model = nn.Sequential(bn.BatchNorm1d(C))
    model(torch.randn(4, C))
    before = copy.deepcopy(model.state_dict())
    with recorded() as calls:
        merge_running_statistics(model)
    assert calls == []
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@case(2)
def lenet_trains_as_on_one_process() -> None:
    # Rounding grows along a training run, so the float64 run shows what float32's difference is made of.
    for dtype, steps, tolerance in ((torch.float64, 20, 1e-12), (torch.float32, 100, 1e-3)):
        torch.manual_seed(0)
        one = LeNet().to(dtype)
        ddp = DistributedDataParallel(synchronised(copy.deepcopy(one)))
        pictures = torch.randn(10, 1, 28, 28)
        pairs = [(model, torch.optim.SGD(model.parameters(), lr=0.1)) for model in (one, ddp)]
        rank = dist.get_rank()
        losses: list[list[Tensor]] = [[], []]
        for _ in range(steps):
            labels = torch.randint(10, (64,))
            images = (pictures[labels] + torch.randn(64, 1, 28, 28)).to(dtype)
            mine = slice(32 * rank, 32 * rank + 32)
            for (model, optimizer), curve, batch in zip(pairs, losses, (slice(64), mine), strict=True):
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.detach())
        ours, wanted = torch.stack(losses[1]), torch.stack(losses[0])
        dist.all_reduce(ours)
        assert wanted[-1] < 0.9 * wanted[0]
        assert_near(ours / 2, wanted, tolerance, f"{dtype} loss curve")


@case(2)
def a_process_that_does_not_come() -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    if dist.get_rank() == 0:
        model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C, sync=group))
        with pytest.raises(
            RuntimeError, match=r"BatchNorm1d '1': the all-reduce .*ranks \[0, 1\] .*on rank 0"
        ):
            model(torch.randn(4, C))
    dist.barrier()


@case(2)
def a_process_that_does_not_come_back() -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C, sync=group))
    y = model(torch.randn(4, C))
    if dist.get_rank() == 0:
        with pytest.raises(
            RuntimeError, match=r"BatchNorm1d '1': the all-reduce .*ranks \[0, 1\] .*on rank 0"
        ):
            y.sum().backward()
    dist.barrier()
