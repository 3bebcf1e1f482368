"""Where each batch norm of a model goes when it is folded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from batchnorm.model.folding.arithmetic import Affine
from batchnorm.model.folding.calls import Calls
from batchnorm.model.folding.functional import FunctionalNorm
from batchnorm.model.folding.norms import Norm
from batchnorm.model.folding.paths import Channel, Graph, Layer
from batchnorm.model.folding.report import Folded, NotFolded
from batchnorm.model.folding.traced import TracedGraph
from batchnorm.model.folding.weights import inherits_forward, shift_meets_zeros
from batchnorm.model.hooks import has_hooks
from batchnorm.names import quoted

# A call of a layer next to a batch norm, and the moves between them.
_Way = tuple[Any, tuple[Any, ...]]


@dataclass(frozen=True)
class Step:
    """`affine` of a batch norm goes into another layer: `comes_after` it, or before."""

    norm: str
    into: str
    affine: Affine
    comes_after: bool


@dataclass(frozen=True)
class Replaced:
    """A batch norm whose place is taken by something else; with `affine` that does the arithmetic itself.

    `index`: of one that is a call of a function in the forward of module `layer`; else None.
    """

    layer: str
    index: int | None
    affine: Affine | None
    channel_dim: int
    with_residual: bool


@dataclass
class Plan:
    """By qualified names, so that it can be carried out on any copy."""

    steps: list[Step] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)
    multiply_adds: list[NotFolded] = field(default_factory=list)
    left_alone: list[NotFolded] = field(default_factory=list)
    replaced: list[Replaced] = field(default_factory=list)
    by_example: list[str] = field(default_factory=list)
    operations_saved: int = 0

    def watched(self) -> list[str]:
        """Layers whose outputs are the same before and after."""
        last = {step.into: step.norm for step in self.steps if step.comes_after}
        behind = {step.into for step in self.steps if not step.comes_after} - set(last)
        modules = {replaced.layer for replaced in self.replaced if replaced.index is None}
        kept = {r.layer for r in self.replaced if r.index is None and r.affine is not None}
        return sorted({name for name in last.values() if name in modules} | behind | kept)


class Planner:
    """Decides where each batch norm goes, in the order of the graph.

    Args:
        names: of the modules.
        calls: what the example did with them.
        norms: what is known of the batch norms.
        weighted: layers whose weights take in a scale and a shift after them.
        traced: what holds for every input.
        recorded: what holds for the example, asked where `traced` does not say.
    """

    def __init__(
        self,
        names: dict[nn.Module, str],
        calls: dict[nn.Module, Calls],
        norms: dict[Layer, Norm],
        weighted: set[nn.Module],
        traced: TracedGraph,
        recorded: Graph[Any] | None,
    ) -> None:
        self._names, self._calls, self._norms, self._weighted = names, calls, norms, weighted
        self._traced = traced
        self._graphs: list[Graph[Any]] = [traced] if recorded is None else [traced, recorded]
        for graph in self._graphs:
            graph.pass_nothing_on()
        self._done: set[Layer] = set()
        self._plan = Plan()

    def plan(self) -> Plan:
        """Decide for each batch norm of the model, those without a place in a graph last."""
        for layer in sorted(self._norms, key=self._place):
            self._decide(layer, self._norms[layer])
            self._done.add(layer)
        return self._plan

    def _place(self, layer: Layer) -> tuple[bool, int]:
        places = [graph.places[layer] for graph in reversed(self._graphs) if layer in graph.places]
        return not places, places[0] if places else 0

    def _decide(self, layer: Layer, norm: Norm) -> None:
        norm.reason = norm.reason or self._why_fixed(layer)
        if norm.reason:
            self._plan.left_alone.append(NotFolded(norm.name, norm.reason))
            return
        targets, graph, comes_after = self._targets(layer, norm)
        if not targets:
            self._plan.multiply_adds.append(NotFolded(norm.name, self._why_not_folded(layer)))
        residual = isinstance(layer, nn.Module) and self._calls[layer].with_residual
        module, index = (layer.owner, layer.index) if isinstance(layer, FunctionalNorm) else (layer, None)
        self._plan.replaced.append(
            Replaced(self._names[module], index, None if targets else norm.affine, norm.channel_dim, residual)
        )
        for target, repeats in targets.items():
            self._fold(layer, norm, target, repeats, comes_after)
        if targets:
            self._note_folded(layer, norm, residual)
            if graph is not self._traced and self._stands_in_untraceable(layer):
                self._plan.by_example.append(norm.name)

    def _targets(self, layer: Layer, norm: Norm) -> tuple[dict[Layer, int], Graph[Any] | None, bool]:
        """The layers that take it in, and how many features each channel is there; before it or after."""
        self._reasons: dict[Graph[Any], list[str]] = {graph: [] for graph in self._graphs}
        for find, comes_after in ((self._layers_before, True), (self._layers_after, False)):
            for graph in self._graphs:
                if not comes_after and graph is not self._traced and self._stands_in_untraceable(layer):
                    continue  # another path may give the layer after it something else
                found, reason = find(graph, layer, norm)
                if found:
                    return found, graph, comes_after
                self._reasons[graph].append(reason)
        return {}, None, False

    def _why_not_folded(self, layer: Layer) -> str:
        """By the first graph that shows the layer."""
        graphs = [graph for graph in self._graphs if graph.nodes.get(layer)]
        return "; ".join(self._reasons[(graphs or self._graphs)[0]])

    def _fold(self, layer: Layer, norm: Norm, target: Layer, repeats: int, comes_after: bool) -> None:
        assert norm.affine is not None
        other = self._norms.get(target)
        if other is not None:
            assert other.affine is not None
            self._plan.folded.append(Folded(norm.name, other.name))
            other.affine = other.affine.after(norm.affine)
            return
        assert isinstance(target, nn.Module)
        name = self._names[target]
        self._plan.folded.append(Folded(norm.name, quoted(target, name)))
        affine = norm.affine.repeated(repeats) if repeats > 1 else norm.affine
        from_layer = self._names[layer] if isinstance(layer, nn.Module) else norm.name
        self._plan.steps.append(Step(from_layer, name, affine, comes_after))

    def _note_folded(self, layer: Layer, norm: Norm, residual: bool) -> None:
        if isinstance(layer, nn.Module):
            self._plan.operations_saved += 2 * sum(shape.numel() for shape in self._calls[layer].shapes)
        if not norm.applies and not residual:
            for graph in self._graphs:
                graph.pass_on(layer)

    def _stands_in_untraceable(self, layer: Layer) -> bool:
        owners = self._graphs[-1].owners(layer)
        return any(owner in self._traced.errors for owner in owners)

    def _why_fixed(self, layer: Layer) -> str:
        if isinstance(layer, FunctionalNorm):
            return ""
        if any(graph.reads_tensors_of(layer) for graph in self._graphs):
            return "its parameters or statistics are used elsewhere in the forward too"
        return "the example does not run it" if self._calls[layer].count == 0 else ""

    def _layers_before(self, graph: Graph[Any], layer: Layer, norm: Norm) -> tuple[dict[Layer, int], str]:
        """The layers that are all that the batch norm reads, and that nothing else does, or the reason."""
        if reason := graph.why_incomplete(layer):
            return {}, reason
        found: dict[Layer, list[_Way]] = {}
        for node in graph.nodes[layer]:
            source, moves, reason = graph.source(node)
            if source is None:
                return {}, reason
            target = graph.layer(source)
            if target not in self._weighted:
                return {}, f"it follows {graph.describe(source)}"
            found.setdefault(target, []).append((source, moves))
        return self._all_fit(graph, norm, found, backwards=True)

    def _layers_after(self, graph: Graph[Any], layer: Layer, norm: Norm) -> tuple[dict[Layer, int], str]:
        """The layers that are all that reads the batch norm, and read nothing else, or the reason."""
        if norm.applies or (isinstance(layer, nn.Module) and self._calls[layer].with_residual):
            return {}, "an activation or a residual follows"
        if graph.why_incomplete(layer):
            return {}, "what follows is not in a traced graph"
        found: dict[Layer, list[_Way]] = {}
        for node in graph.nodes[layer]:
            readers, reason = graph.readers(node)
            if reason:
                return {}, reason
            for reader, moves in readers:
                target = graph.layer(reader)
                if target is None or not (self._takes_scale_before(target) or target in self._norms):
                    return {}, f"{graph.describe(reader)} follows"
                found.setdefault(target, []).append((reader, moves))
        targets, reason = self._all_fit(graph, norm, found, backwards=False)
        for target in targets:
            assert norm.affine is not None
            if target not in self._norms and shift_meets_zeros(target) and norm.affine.shift.any():
                return {}, f"its shift does not go through the zero padding of {self._describe(target)}"
        return targets, reason

    def _takes_scale_before(self, target: Layer) -> bool:
        return isinstance(target, nn.Module) and inherits_forward(target)

    def _all_fit(
        self, graph: Graph[Any], norm: Norm, found: dict[Layer, list[_Way]], *, backwards: bool
    ) -> tuple[dict[Layer, int], str]:
        """Each layer with how many of its features a channel is there, or the reason why one does not fit."""
        targets: dict[Layer, int] = {}
        for target, ways in found.items():
            reason = self._why_not(graph, target, ways)
            repeats = None if reason else self._repeats(graph, norm, target, ways, backwards)
            if repeats is None:
                what = f"{self._describe(target)} has its channels in another dimension"
                return {}, reason or what
            targets[target] = repeats
        return targets, ""

    def _why_not(self, graph: Graph[Any], target: Layer, ways: list[_Way]) -> str:
        """Why a batch norm cannot go into `target`, or nothing; `ways` lead to the calls next to it."""
        what = self._describe(target)
        other = self._norms.get(target)
        if other is not None and (target in self._done or other.reason or self._why_fixed(target)):
            return f"{what} is left alone"
        if {node for node, _ in ways} != set(graph.nodes[target]):
            return f"{what} is used elsewhere too"
        if graph.why_incomplete(target):
            return f"{what} is called outside of the traced graph too"
        if isinstance(target, nn.Module):
            if has_hooks(target):
                return f"{what} has hooks"
            if graph.reads_tensors_of(target):
                return f"the weights of {what} are used elsewhere in the forward too"
        return ""

    def _repeats(
        self, graph: Graph[Any], norm: Norm, target: Layer, ways: list[_Way], backwards: bool
    ) -> int | None:
        """How many features of `target` in a row each channel is; None where they are other ones."""
        found = set()
        for rank in norm.ranks:
            for _, moves in ways:
                channel = graph.follow(moves, Channel(norm.dim(rank), rank), backwards=backwards)
                if channel is None or channel.dim != self._channel_dim(target, channel.rank):
                    return None
                found.add(channel.repeats or self._features(target, backwards) // norm.channels)
        repeats = found.pop() if len(found) == 1 else None
        return repeats if repeats == 1 or isinstance(target, nn.Linear) else None

    def _channel_dim(self, target: Layer, rank: int) -> int:
        """Where `target` has its channels in an input or output of so many dimensions."""
        if target in self._norms:
            return self._norms[target].dim(rank)
        if isinstance(target, nn.Linear):
            return rank - 1
        return rank - 1 - len(target.kernel_size)  # type: ignore[union-attr,arg-type]

    def _features(self, target: Layer, backwards: bool) -> int:
        if isinstance(target, nn.Linear):
            return target.out_features if backwards else target.in_features
        return 0

    def _describe(self, target: Layer) -> str:
        return self._norms[target].name if target in self._norms else quoted(target, self._names[target])  # type: ignore[index,arg-type]
