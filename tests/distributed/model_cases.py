"""What a set of processes checks together about whole models: convert, training, accumulation, DDP, bytes."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from batchnorm.lab.nets import LeNet
from tests.distributed import cases
from tests.distributed.cases import SPLITS, C, assert_near, case, parts, recorded


class Block(nn.Module):
    """Convolution, batch norm and ReLU; convolution, batch norm, add and ReLU; features, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.second, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.SyncBatchNorm(C)
        self.last = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), bn.BatchNorm1d(C))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.relu(self.norm(self.second(x)) + x).mean((2, 3)))


@case(2, 3)
def converted_models_match_one_process() -> None:
    for sizes in SPLITS[dist.get_world_size()]:
        torch.manual_seed(1)
        one = Block().double()
        for sync, fuse in ((True, True), (dist.group.WORLD, False)):
            ours = bn.convert(copy.deepcopy(one), sync=sync, fuse=fuse)
            expected = bn.convert(copy.deepcopy(one), fuse=False)
            x = torch.randn(sum(sizes), 2, 5, 4, dtype=torch.float64)
            grad = torch.randn(sum(sizes), C, dtype=torch.float64)
            mine, whole = parts(x, sizes).requires_grad_(), x.clone().requires_grad_()
            for layer in expected.modules():
                if hasattr(layer, "sync"):
                    layer.sync = False
            wanted = expected(whole)
            wanted.backward(grad)
            y = ours(mine)
            y.backward(parts(grad, sizes))
            assert_near(y, parts(wanted, sizes), 1e-9, f"{sizes} y")
            assert_near(mine.grad, parts(whole.grad, sizes), 1e-9, f"{sizes} gradient of x")
            for (name, parameter), theirs in zip(ours.named_parameters(), expected.parameters(), strict=True):
                dist.all_reduce(parameter.grad)
                error = (parameter.grad - theirs.grad).abs().max()
                assert error <= 1e-9, f"{sizes} gradient of {name}: {error}"
            for name, buffer in ours.named_buffers():
                error = (buffer - expected.get_buffer(name)).abs().max()
                assert error <= 1e-12, f"{sizes} {name}: {error}"
            bn.revert(ours)
            assert [type(m) for m in ours.modules()] == [type(m) for m in one.modules()]
            assert ours.last[2].sync is False


@case(3)
def a_model_in_a_sub_group() -> None:
    group = cases.PAIR if dist.get_rank() < 2 else cases.ALONE
    model = bn.convert(nn.Sequential(nn.BatchNorm1d(C, momentum=1.0)), sync=group)
    model(torch.arange(12.0)[:, None].expand(12, C)[4 * dist.get_rank() :][:4])
    wanted = 3.5 if dist.get_rank() < 2 else 9.5
    assert model[0].running_mean.tolist() == [wanted] * C


@case(2)
def accumulated_gradients_are_those_of_one_process() -> None:
    """Micro-batches under no_sync, the last of them reduced: each is normalised over the processes."""
    torch.manual_seed(2)
    one = LeNet().double()
    ddp = DistributedDataParallel(bn.convert(copy.deepcopy(one), sync=True))
    images, labels = torch.randn(3, 6, 1, 28, 28, dtype=torch.float64), torch.randint(10, (3, 6))
    mine = slice(2) if dist.get_rank() == 0 else slice(2, 6)
    for step in range(3):
        nn.functional.cross_entropy(one(images[step]), labels[step]).backward()
        loss = nn.functional.cross_entropy(ddp(images[step, mine]), labels[step, mine], reduction="sum")
        if step < 2:
            with ddp.no_sync():
                (loss * 2 / 6).backward()
        else:
            (loss * 2 / 6).backward()
    largest = max(float(p.grad.abs().max()) for p in one.parameters())
    for ours, wanted in zip(ddp.module.parameters(), one.parameters(), strict=True):
        assert (ours.grad - wanted.grad).abs().max() <= 1e-9 * largest
    for ours, wanted in zip(ddp.module.buffers(), one.buffers(), strict=True):
        assert_near(ours, wanted, 1e-9, "buffers")


@case(2)
def ddp_broadcasts_buffers_between_two_forwards_and_a_backward() -> None:
    """pytorch#65907: what the first forward saved is not what the broadcast before the second writes."""
    for options in (
        {}, {"sync": True}, {"momentum": None}, {"renorm": True}, {"activation": "relu"},
        {"sync": True, "renorm": True, "activation": "relu"},
    ):  # fmt: skip
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C, **options))
        twin = copy.deepcopy(model)
        ddp = DistributedDataParallel(model)  # broadcasts buffers before each forward
        torch.manual_seed(dist.get_rank())
        first, second = torch.randn(2, 4, C)
        (ddp(first).pow(3).sum() + ddp(second).pow(3).sum()).backward()
        wanted: dict[str, Tensor] = {}
        for x in (first, second):
            for buffer in twin.buffers():
                dist.broadcast(buffer, 0)
            twin(x).pow(3).sum().backward()
        for name, parameter in twin.named_parameters():
            wanted[name] = parameter.grad / 2
            dist.all_reduce(wanted[name])
        assert model[1].num_batches_tracked == 2
        for name, parameter in model.named_parameters():
            error = (parameter.grad - wanted[name]).abs().max()
            assert error <= 1e-4 * wanted[name].abs().max() + 1e-5, f"{options} {name}: {error}"


@case(2, 3, 4)
def bytes_of_a_step() -> None:
    """A step of LeNet: what a process hands to the all-reduces does not grow with their number."""
    model, k = bn.convert(LeNet(norm="torch"), sync=True), dist.get_world_size()
    with recorded() as calls:
        model(torch.randn(3, 1, 28, 28)).sum().backward()
    channels = (6, 16, 120, 84)
    assert [size for _, size in calls[:4]] == [8 * (2 * c + 1) for c in channels]
    assert [size for _, size in calls[4:]] == [8 * 2 * c for c in reversed(channels)]
    # SyncBatchNorm: what a process holds after gathering 2C+1 float32 numbers of each.
    assert all(size <= 4 * k * (2 * c + 1) for (_, size), c in zip(calls, channels, strict=False))
    numbers = sum(size for _, size in calls) // 8
    gathered, reduced = sum(2 * c + 1 for c in channels), sum(2 * c for c in channels)
    assert ring(k) * numbers <= (k - 1) * gathered + ring(k) * reduced
    # In float64 each is twice as long: in bytes that a ring sends, ours are fewer from 6 processes on.
    in_bytes = {k: (8 * ring(k) * numbers, 4 * ((k - 1) * gathered + ring(k) * reduced)) for k in range(2, 9)}
    assert [k for k, (ours, theirs) in in_bytes.items() if ours < theirs] == [6, 7, 8]


def ring(k: int) -> float:
    """How often a process sends each number in a ring all-reduce."""
    return 2 * (k - 1) / k


def synchronised(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, bn.BatchNorm1d | bn.BatchNorm2d):
            layer.sync = True
    return model


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
