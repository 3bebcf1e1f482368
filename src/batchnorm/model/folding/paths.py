"""What lies between two layers of a graph: the way from a batch norm to the layers next to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn

from batchnorm.model.folding.calls import Calls
from batchnorm.model.folding.functional import FunctionalNorm

Node = TypeVar("Node")
Layer = nn.Module | FunctionalNorm


class Channel(NamedTuple):
    """Where the channels of a batch norm are: a dimension of a tensor of so many dimensions.

    `repeats`: how many features in a row belong to each channel; None where the next layer tells.
    """

    dim: int
    rank: int
    repeats: int | None = 1


class Graph(ABC, Generic[Node]):
    """Calls of layers and what goes on between them.

    Attributes:
        calls: what the example did with each module.
        nodes: where each layer is called.
        places: where the first call of each layer is, in order.
    """

    def __init__(self, calls: dict[nn.Module, Calls]) -> None:
        self.calls = calls
        self.nodes: dict[Layer, list[Node]] = {}
        self.places: dict[Layer, int] = {}
        self._layers: dict[Node, Layer] = {}
        self._tensors_read: set[int] = set()
        self._passing: set[Layer] = set()

    def layer(self, node: Node) -> Layer | None:
        """The layer that `node` calls."""
        return self._layers.get(node)

    def pass_on(self, layer: Layer) -> None:
        """From now on `layer` passes its input on unchanged."""
        self._passing.add(layer)

    def pass_nothing_on(self) -> None:
        """From now on no layer does."""
        self._passing.clear()

    def reads_tensors_of(self, module: nn.Module) -> bool:
        """Whether a forward uses Parameters or buffers of `module` other than by calling it."""
        tensors = (*module.parameters(), *module.buffers())
        return any(id(tensor) in self._tensors_read for tensor in tensors)

    def source(self, node: Node) -> tuple[Node | None, tuple[Node, ...], str]:
        """What `node` reads, and the moves on the way there; or None and why not."""
        moves: tuple[Node, ...] = ()
        value = self._input(node)
        if value is not None and self._times_read(node, value) > 1:
            return None, (), "its input is its residual too"
        while True:
            if value is None:
                return None, (), "its input is not in the graph"
            if self._number_of_users(value) > 1:
                return None, (), f"the output of {self.describe(value)} is used elsewhere too"
            if self._moves(value, backwards=True):
                moves = (*moves, value)
            elif not self._passes_on(value):
                return value, moves, ""
            value = self._input(value)

    def readers(self, node: Node) -> tuple[list[tuple[Node, tuple[Node, ...]]], str]:
        """All calls that read `node`, each with the moves on the way there, or none and why not."""
        found: list[tuple[Node, tuple[Node, ...]]] = []
        pending: list[tuple[Node, tuple[Node, ...]]] = [(node, ())]
        while pending:
            value, moves = pending.pop()
            if self._is_output(value):
                return [], "its output is that of the traced module"
            users = self._users(value)
            if not users:
                return [], "nothing reads its output"
            for user in users:
                layer = self.layer(user)
                if layer is not None and (self._input(user) != value or self._times_read(user, value) > 1):
                    return [], f"{self.describe(user)} reads its output as more than its input"
                if self._passes_on(user):
                    pending.append((user, moves))
                elif self._moves(user, backwards=False):
                    pending.append((user, (*moves, user)))
                else:
                    found.append((user, moves))
        return found, ""

    def follow(self, moves: tuple[Node, ...], channel: Channel, *, backwards: bool) -> Channel | None:
        """Where the channels are once `moves` are followed; None where they are mixed with others."""
        for node in moves:
            if channel.repeats != 1:
                return None
            moved = self._moved(node, channel, backwards)
            if moved is None:
                return None
            channel = moved
        return channel

    def owners(self, layer: Layer) -> set[nn.Module]:
        """The modules in whose forwards `layer` is called, where that is known."""
        return set()

    @abstractmethod
    def why_incomplete(self, layer: Layer) -> str:
        """Why the graph does not show all calls of `layer`; empty where it does."""

    @abstractmethod
    def describe(self, node: Node) -> str:
        """`node` in a reason."""

    @abstractmethod
    def _input(self, node: Node) -> Node | None: ...

    @abstractmethod
    def _users(self, node: Node) -> list[Node]: ...

    def _number_of_users(self, node: Node) -> int:
        return len(self._users(node)) + self._is_output(node)

    @abstractmethod
    def _is_output(self, node: Node) -> bool: ...

    @abstractmethod
    def _times_read(self, node: Node, value: Node) -> int: ...

    @abstractmethod
    def _passes_on(self, node: Node) -> bool:
        """Whether `node` gives its input on unchanged."""

    @abstractmethod
    def _moves(self, node: Node, *, backwards: bool) -> bool:
        """Whether `node` gives the values of its input in another order or shape, and can be followed."""

    @abstractmethod
    def _moved(self, node: Node, channel: Channel, backwards: bool) -> Channel | None:
        """Where a move puts the channels of its input; `backwards`, those of its output in its input."""


def describe_function(target: Any) -> str:
    """A function in a reason."""
    return f"{getattr(target, '__name__', target)}()"
