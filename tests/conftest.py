"""Shared by all tests."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # Triton looks at it once, when it is first imported: by our kernels, or by torch's compiler before them.
    os.environ["TRITON_INTERPRET"] = "1"
# A shell's background jobs ignore Ctrl-C, and so would the processes that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The tensors are small: two threads would wait for each other, and on a busy machine for much longer.
    torch.set_num_threads(1)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """While a test runs, this process is the only one of a process group."""
    if not dist.is_available():
        pytest.skip("torch without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    # DistributedDataParallel goes first. As the last to hold the group it ends gloo's threads without letting
    # go of the GIL, for which one of them may be waiting, for ever (pytorch/pytorch#56297).
    gc.collect()
    dist.destroy_process_group()
