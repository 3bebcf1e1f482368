"""Shared by all tests."""

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    # Triton looks at it once, when it is first imported: by our kernels, or by torch's compiler before them.
    os.environ["TRITON_INTERPRET"] = "1"
# A shell's background jobs ignore Ctrl-C, and so would the processes that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The tensors are small: two threads would wait for each other, and on a busy machine for much longer.
    torch.set_num_threads(1)
