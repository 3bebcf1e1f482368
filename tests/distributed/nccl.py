"""One of a set of processes with a GPU each: `python -m tests.distributed.nccl RANK PROCESSES FOLDER`."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import batchnorm as bn
from batchnorm import distributed
from batchnorm.kernels.cuda import thresholds

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def compare(backend: str, device: torch.device, rank: int, processes: int, folder: Path) -> None:
    """A layer over the processes, by the kernels and by torch, beside float64 on the whole batch."""
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
    try:
        compare_batches(device, rank, processes)
    finally:
        dist.destroy_process_group()


def compare_batches(device: torch.device, rank: int, processes: int) -> None:
    with pytest.MonkeyPatch.context() as patch, thresholds.everywhere():
        # A group of one would not communicate.
        patch.setattr(distributed, "group_of", lambda sync: dist.group.WORLD if sync else None)
        for dtype, activation, with_residual, last in [
            (torch.float32, "relu", False, False),
            (torch.float32, "silu", True, True),
            (torch.bfloat16, "silu", True, True),
            (torch.float32, None, False, False),
        ]:
            one_batch(device, rank, processes, dtype, activation, with_residual, last)


def one_batch(
    device: torch.device,
    rank: int,
    processes: int,
    dtype: torch.dtype,
    activation: str | None,
    with_residual: bool,
    last: bool,
) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    sizes = [4, 2][:processes]
    whole = [torch.randn(sum(sizes), 6, 20, 20).to(dtype).to(device) for _ in range(3)]
    mine = [tensor.split(sizes)[rank].contiguous(memory_format=layout) for tensor in whole]
    options = {"activation": activation, "momentum": 1.0, "device": device}
    layer, one = bn.BatchNorm2d(6, sync=True, **options), bn.BatchNorm2d(6, **options).double()
    found = []
    for network, (x, residual, grad) in ((layer, mine), (one, [tensor.double() for tensor in whole])):
        leaves = [x.requires_grad_(), residual.requires_grad_()][: 1 + with_residual]
        y = network(*leaves)
        y.backward(grad)
        found.append([y, *[leaf.grad for leaf in leaves]])
    for parameter in layer.parameters():
        dist.all_reduce(parameter.grad)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "check_dtype": False}
    assert_close(found[0], [tensor.split(sizes)[rank] for tensor in found[1]], **close)
    of_sums = {**close, "atol": 10 * TOLERANCE[dtype]}  # of a thousand terms, and each is rounded
    for ours, theirs in zip(layer.parameters(), one.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, **of_sums)
    for name, ours in layer.named_buffers():
        assert_close(ours, one.get_buffer(name), rtol=1e-5, atol=1e-5, check_dtype=False)


if __name__ == "__main__":
    RANK, PROCESSES = map(int, sys.argv[1:3])
    torch.cuda.set_device(RANK)
    compare("nccl", torch.device("cuda", RANK), RANK, PROCESSES, Path(sys.argv[3]))
