"""Adam whose rate and momentum are read from tables on the device, for scheduled steps in a CUDA graph.

A graph repeats the numbers it was captured with, and a schedule sets Python's in every step. Those of all
steps are known beforehand. torch's own Adam takes a rate on the device, but asks the device for a momentum
that lies there, which a capture forbids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import LRScheduler


class ScheduledAdam:
    """`optimizer.step()`, by the rates and momenta of a schedule (Kingma & Ba 2015, algorithm 1).

    The state is the optimizer's own: steps of both may follow each other.

    Args:
        optimizer: with one group of parameters, and no weight decay.
        make_schedule: makes the schedule of an optimizer; it may depend on nothing else.
        steps: of the whole training.
    """

    def __init__(self, optimizer: Adam, make_schedule: Callable[[Adam], LRScheduler], steps: int) -> None:
        (group,) = optimizer.param_groups
        self._parameters: list[torch.Tensor] = group["params"]
        self._beta2, self._eps = group["betas"][1], group["eps"]
        device = self._parameters[0].device
        self._table = _table(make_schedule, group["lr"], self._beta2, steps).to(device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        for parameter in self._parameters:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [optimizer.state[parameter] for parameter in self._parameters]
        self._steps, self._means, self._squares = (
            [state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")
        )

    def go_to(self, step: int) -> None:
        """Let the next step be this one of the training, from 0."""
        self._at.fill_(step)

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters by their gradients; nothing is read by the host."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        # By a vector of one index: a single number would be asked for by the host.
        share, size, root = self._table[self._at].to(self._parameters[0].dtype).squeeze(0).unbind()
        torch._foreach_add_(self._steps, 1)
        towards = torch._foreach_sub(gradients, self._means)
        torch._foreach_mul_(towards, share)
        torch._foreach_add_(self._means, towards)
        torch._foreach_mul_(self._squares, self._beta2)
        torch._foreach_addcmul_(self._squares, gradients, gradients, 1 - self._beta2)
        divisors = torch._foreach_sqrt(self._squares)
        torch._foreach_div_(divisors, root)
        torch._foreach_add_(divisors, self._eps)
        torch._foreach_div_(divisors, size)
        torch._foreach_addcdiv_(self._parameters, self._means, divisors)
        self._at += 1


def _table(make_schedule: Callable[[Adam], LRScheduler], lr: float, beta2: float, steps: int) -> torch.Tensor:
    """Per step t from 1 on, (steps, 3): `1 - beta1`, `-lr / (1 - beta1**t)` and `sqrt(1 - beta2**t)`."""
    stand_in = Adam([torch.zeros(())], lr=lr)
    schedule = make_schedule(stand_in)
    (group,) = stand_in.param_groups
    rows = []
    for t in range(1, steps + 1):
        beta1 = group["betas"][0]
        rows.append((1 - beta1, -group["lr"] / (1 - beta1**t), (1 - beta2**t) ** 0.5))
        stand_in.step()
        schedule.step()
    return torch.tensor(rows, dtype=torch.float64)
