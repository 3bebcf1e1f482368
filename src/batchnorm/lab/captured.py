"""Training steps captured in a CUDA graph: the GPU goes from step to step without waiting for Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Steps in the larger of two graphs (one of a whole epoch would hold a million nodes; the smaller has one
# step, for what is left), and steps before they are captured, in which libraries choose their kernels.
STEPS_PER_GRAPH, WARM_UP = 50, 3

Step = Callable[[Tensor, Tensor], Tensor]


class CapturedSteps:
    """The whole batches of epochs in CUDA graphs; each step finds its batch by a counter on the device.

    Args:
        step: trains on images and labels, and returns the loss; nothing in it may depend on a number in
            Python that changes, or wait for the device.
        images, labels: all of them, on the device.
        batch_size: of every step.
        capture: turns work into a function that does it again; by default a CUDA graph.
    """

    def __init__(
        self,
        step: Step,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        self._step, self._images, self._labels, self._size = step, images, labels, batch_size
        self._capture = capture_graph if capture is None else capture
        self._order = torch.empty(len(labels), dtype=torch.int64, device=labels.device)
        self._within_batch = torch.arange(batch_size, device=labels.device)
        self._at = torch.zeros((), dtype=torch.int64, device=labels.device)
        self._sum_of_losses = torch.zeros((), device=labels.device)
        self._again: tuple[Callable[[], None], Callable[[], None]] | None = None

    def run(self, order: Tensor, on_steps: Callable[[int], None]) -> tuple[Tensor, int]:
        """Train on the whole batches of an epoch, in this order of all images.

        Returns:
            The sum of the batches' losses, and how many batches there were.
        """
        self._order.copy_(order)
        self._at.zero_()
        self._sum_of_losses.zero_()
        left = len(order) // self._size
        if self._again is None and left >= WARM_UP + STEPS_PER_GRAPH:
            self._warm_up()
            left -= WARM_UP
            on_steps(WARM_UP)
            self._again = self._capture(self._steps), self._capture(self._one)
        many, one = (self._steps, self._one) if self._again is None else self._again
        while left >= STEPS_PER_GRAPH:
            many()
            left -= STEPS_PER_GRAPH
            on_steps(STEPS_PER_GRAPH)
        for _ in range(left):
            one()
        on_steps(left)
        return self._sum_of_losses.clone(), len(order) // self._size

    def _warm_up(self) -> None:
        if not self._labels.is_cuda:
            for _ in range(WARM_UP):
                self._one()
            return
        # On a stream of their own, as torch asks for before a capture.
        side = torch.cuda.Stream(self._labels.device)
        side.wait_stream(torch.cuda.current_stream(self._labels.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._one()
        torch.cuda.current_stream(self._labels.device).wait_stream(side)

    def _steps(self) -> None:
        for _ in range(STEPS_PER_GRAPH):
            self._one()

    def _one(self) -> None:
        chosen = self._order[self._at * self._size + self._within_batch]
        self._sum_of_losses += self._step(self._images[chosen], self._labels[chosen])
        self._at += 1


def capture_graph(work: Callable[[], None]) -> Callable[[], None]:
    """A function that does the work again on the GPU; the work itself is recorded and not done."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
