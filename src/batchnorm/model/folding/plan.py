"""Where each batch norm of a model goes when it is folded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import layers
from batchnorm.model.folding.arithmetic import Affine, MultiplyAdd, ResidualActivation, shift_meets_zeros
from batchnorm.model.folding.check import EvalSyncBatchNorm
from batchnorm.model.folding.graph import Graphs, Path, inherits_forward, moved
from batchnorm.model.folding.report import Folded, NotFolded
from batchnorm.model.hooks import has_hooks
from batchnorm.names import quoted

_FORWARDS = (
    _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    EvalSyncBatchNorm.forward,
    layers._BatchNorm.forward,
)
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


@dataclass(frozen=True)
class Step:
    """`affine` of a batch norm goes into another layer: `comes_after` it, or before."""

    layer: str
    into: str
    affine: Affine
    comes_after: bool


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a batch norm; with `affine` it does the arithmetic itself."""

    affine: Affine | None
    activation: str | None
    channel_dim: int
    with_residual: bool

    def of(self, layer: _BatchNorm) -> nn.Module:
        """The module for `layer`, in its dtype and as trainable."""
        if self.affine is not None:
            like = layer.running_mean if layer.weight is None else layer.weight
            assert like is not None
            trains = any(parameter.requires_grad for parameter in layer.parameters())
            return MultiplyAdd(self.affine, like.dtype, self.channel_dim, self.activation, trains).eval()
        if self.activation is None and not self.with_residual:
            return nn.Identity().eval()
        return ResidualActivation(self.activation).eval()


@dataclass
class Plan:
    """By qualified names, so that it can be carried out on any copy."""

    steps: list[Step] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)
    multiply_adds: list[NotFolded] = field(default_factory=list)
    left_alone: list[NotFolded] = field(default_factory=list)
    replacements: dict[str, Replacement] = field(default_factory=dict)
    operations_saved: int = 0

    def watched(self) -> list[str]:
        """Layers whose outputs are the same before and after."""
        last = {step.into: step.layer for step in self.steps if step.comes_after}
        behind = {step.into for step in self.steps if not step.comes_after} - set(last)
        kept = {name for name, replacement in self.replacements.items() if replacement.affine is not None}
        return sorted({*last.values()} | behind | kept)


class Planner:
    """Decides where each batch norm goes, in the order of the graph."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._affines: dict[nn.Module, Affine] = {}
        self._done: set[nn.Module] = set()
        self._plan = Plan()

    def plan(self) -> Plan:
        """Decide for each batch norm of the model, those without a place in the graph last.

        Raises:
            ValueError: one has running statistics and a scale or shift that is not finite.
        """
        names = self._graphs.names
        norms = [module for module in names if isinstance(module, _BatchNorm)]
        for norm in norms:
            if _has_statistics(norm):
                self._affines[norm] = self._finite_affine(norm)
        for norm in sorted(norms, key=self._place):
            self._decide(norm)
            self._done.add(norm)
        return self._plan

    def _place(self, norm: nn.Module) -> tuple[bool, int]:
        place = self._graphs.place(norm)
        return place is None, place or 0

    def _finite_affine(self, norm: _BatchNorm) -> Affine:
        affine = Affine.of(norm)
        values = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        finite = [value is None or bool(value.isfinite().all()) for value in values]
        if not (affine.is_finite() and all(finite)):
            names = ("running_mean", "running_var", "weight", "bias")
            wrong = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
            raise ValueError(
                f"fold: the scale or shift of {self._describe(norm)} is not finite: look at its "
                f"{', '.join(wrong) or 'running_var'}. Batch norm needs finite values and a variance "
                "of at least 0: recalibrate the model or load other weights"
            )
        return affine

    def _decide(self, norm: _BatchNorm) -> None:
        name = self._graphs.names[norm]
        reason = self._why_fixed(norm)
        if reason:
            self._plan.left_alone.append(NotFolded(self._describe(norm), reason))
            return
        targets, not_before = self._layers_before(norm)
        comes_after, not_after = bool(targets), ""
        if not targets:
            targets, not_after = self._layers_after(norm)
        if not targets:
            self._plan.multiply_adds.append(NotFolded(self._describe(norm), f"{not_before}; {not_after}"))
        self._plan.replacements[name] = Replacement(
            affine=None if targets else self._affines[norm],
            activation=getattr(norm, "activation", None),
            channel_dim=_channels_from_the_end(norm),
            with_residual=self._graphs.calls[norm].with_residual,
        )
        for target in targets:
            self._fold(norm, target, comes_after)
        if targets:
            self._note_folded(norm)

    def _fold(self, norm: _BatchNorm, target: Any, comes_after: bool) -> None:
        names, affine = self._graphs.names, self._affines[norm]
        self._plan.folded.append(Folded(self._describe(norm), self._describe(target)))
        if isinstance(target, _BatchNorm):
            self._affines[target] = self._affines[target].after(affine)
            return
        if not comes_after and isinstance(target, nn.Linear):
            affine = affine.repeated(target.in_features // norm.num_features)  # more than 1 behind a flatten
        self._plan.steps.append(Step(names[norm], names[target], affine, comes_after))

    def _note_folded(self, norm: _BatchNorm) -> None:
        calls = self._graphs.calls[norm]
        self._plan.operations_saved += 2 * sum(shape.numel() for shape in calls.shapes)
        if getattr(norm, "activation", None) is None and not calls.with_residual:
            self._graphs.pass_on(norm)

    def _why_fixed(self, norm: _BatchNorm) -> str:
        if type(norm).forward not in _FORWARDS or "forward" in vars(norm):
            return f"{type(norm).__name__} has a forward of its own"
        if norm.training:
            return "it stays in training mode after model.eval()"
        if not _has_statistics(norm):
            return "without running statistics it normalises by the batch in eval mode too"
        if has_hooks(norm):
            return "it has hooks"
        if self._graphs.reads_tensors_of(norm):
            return "its parameters or statistics are used elsewhere in the forward too"
        if self._graphs.calls[norm].count == 0:
            return "the example does not run it"
        return ""

    def _layers_before(self, norm: _BatchNorm) -> tuple[list[nn.Module], str]:
        """The layers that are all that `norm` reads, and that nothing else does, or none and the reason."""
        graphs = self._graphs
        if not graphs.nodes[norm] or graphs.called_elsewhere(norm):
            return [], "its calls are not all in a traced graph"
        found: dict[nn.Module, list[Path]] = {}
        for node in graphs.nodes[norm]:
            path, reason = graphs.source(node)
            if path is None:
                return [], reason
            target = graphs.module(path[0])
            if target is None or not inherits_forward(target):
                return [], f"it follows {graphs.describe(path[0])}"
            found.setdefault(target, []).append(path)
        for target, paths in found.items():
            reason = self._why_not(norm, target, paths, backwards=True)
            if reason:
                return [], reason
        return list(found), ""

    def _layers_after(self, norm: _BatchNorm) -> tuple[list[nn.Module], str]:
        """The layers that are all that reads `norm`, and read nothing else, or none and the reason."""
        graphs = self._graphs
        if getattr(norm, "activation", None) is not None or graphs.calls[norm].with_residual:
            return [], "an activation or a residual follows"
        if not graphs.nodes[norm] or graphs.called_elsewhere(norm):
            return [], "what follows is not in a traced graph"
        found: dict[nn.Module, list[Path]] = {}
        for node in graphs.nodes[norm]:
            readers, reason = graphs.readers(node)
            if reason:
                return [], reason
            for path in readers:
                target = graphs.module(path[0])
                if target is None or not (inherits_forward(target) or isinstance(target, _BatchNorm)):
                    return [], f"{graphs.describe(path[0])} follows"
                found.setdefault(target, []).append(path)
        for target, paths in found.items():
            reason = self._why_not(norm, target, paths, backwards=False)
            if not reason and shift_meets_zeros(target) and self._affines[norm].shift.any():
                reason = f"its shift does not go through the zero padding of {self._describe(target)}"
            if reason:
                return [], reason
        return list(found), ""

    def _why_not(self, norm: _BatchNorm, target: nn.Module, paths: list[Path], *, backwards: bool) -> str:
        """Why `norm` cannot go into `target`, or nothing; `paths` lead to the calls that it is next to."""
        graphs, what = self._graphs, self._describe(target)
        if isinstance(target, _BatchNorm) and (target in self._done or self._why_fixed(target)):
            return f"{what} is left alone"
        if {node for node, _ in paths} != set(graphs.nodes[target]):
            return f"{what} is used elsewhere too"
        if graphs.called_elsewhere(target):
            return f"{what} is called outside of the traced graph too"
        if has_hooks(target):
            return f"{what} has hooks"
        if graphs.reads_tensors_of(target):
            return f"the weights of {what} are used elsewhere in the forward too"
        ranks = {len(shape) for shape in graphs.calls[norm].shapes}
        fits = all(self._fits(norm, target, moves, rank, backwards) for rank in ranks for _, moves in paths)
        return "" if fits else f"{what} has its channels in another dimension"

    def _fits(
        self, norm: _BatchNorm, target: nn.Module, moves: tuple[Any, ...], rank: int, backwards: bool
    ) -> bool:
        """Whether the channels of `norm` are those of `target` once `moves` are followed."""
        dim = _channels(norm, rank)
        for node in moves:
            if self._graphs.flattens(node):
                # Then a channel is so many features in a row; behind that, nothing else may move.
                return dim == 1 and node is moves[-1] and isinstance(target, nn.Linear)
            dim = moved(dim, rank, node, backwards=backwards)
        return dim == _channels(target, rank)

    def _describe(self, module: nn.Module) -> str:
        return quoted(module, self._graphs.names[module])


def _channels_from_the_end(norm: _BatchNorm) -> int:
    """`channel_dim`, counted from the end where the rank is known: then no forward has to look at it."""
    channel_dim = getattr(norm, "channel_dim", 1)
    rank = next((rank for kind, rank in _RANKS.items() if isinstance(norm, kind)), None)
    return channel_dim if rank is None else channel_dim % rank - rank


def _has_statistics(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


def _channels(layer: Any, rank: int) -> int:
    """Where `layer` has its channels in an input or output of so many dimensions."""
    if isinstance(layer, _BatchNorm):
        return getattr(layer, "channel_dim", 1) % rank
    if isinstance(layer, nn.Linear):
        return rank - 1
    return rank - 1 - len(layer.kernel_size)
