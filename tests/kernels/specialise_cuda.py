"""Calls the layers' kernels as on a GPU, up to the machine code and without running it; run by the tests.

Prints how many kernels Triton has compiled after some batch sizes, and after many more: the calls must be
what its just-in-time compiler takes, and a size that changes from call to call must not compile anew.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from batchnorm.kernels import cuda

compiled = set()


class Hopper:
    """What the compiler asks of a driver."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compile_only(run):
    def run_up_to_machine_code(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.add((self.fn.__name__, id(kernel)))
        return kernel

    return run_up_to_machine_code


def train(shape, layout, dtype, activation, with_residual):
    """Forward with running statistics, inference, and backward."""
    x, residual, grad = (
        torch.ones(shape, dtype=dtype).to(memory_format=layout).requires_grad_() for _ in range(3)
    )
    weight, bias, mean, var = (torch.ones(shape[1]) for _ in range(4))
    options = {"eps": 1e-5 * shape[0], "channel_dim": 1, "activation": activation}
    options["residual"] = residual if with_residual else None
    moved = mean, var, torch.zeros((), dtype=torch.int64), 1 / shape[0]
    y = cuda.training_and_moving(x, weight.requires_grad_(), bias.requires_grad_(), *moved, **options)
    y.backward(grad.detach())
    cuda.inference(x, mean, var, weight, bias, **options)


def count(batches):
    """Kernels so far, after training with these sizes of a batch."""
    for batch in batches:
        train((batch, 64, 28, 28), torch.channels_last, torch.bfloat16, "relu", False)
        train((batch, 256, 14, 14), torch.contiguous_format, torch.float32, "relu", True)
    return len(compiled)


if __name__ == "__main__":
    driver.set_active(Hopper())
    cuda._multiprocessors = lambda device: 132
    JITFunction.run = compile_only(JITFunction.run)
    print(count((32, 256)), count((33, 48, 57, 64, 100, 113, 128, 200, 255, 1000)))
