"""The batch norms that fold takes: what each computes in eval mode, and what it applies after."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.batch_norms import Filter
from batchnorm.model.folding.arithmetic import Affine, Applies, MultiplyAdd, ResidualActivation
from batchnorm.model.folding.functional import FunctionalNorm, FunctionalNorms
from batchnorm.model.folding.paths import Layer
from batchnorm.model.frozen import is_frozen_batch_norm, scale_and_shift_of
from batchnorm.model.hooks import has_hooks
from batchnorm.model.registry import applied, is_known
from batchnorm.names import quoted

LEFT_BY_FILTER = "the filter leaves it"
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


@dataclass(eq=False)
class Norm:
    """A batch norm, a layer or a call of a function.

    Attributes:
        name: as in `BatchNorm2d 'stem.1'`.
        channels: how many.
        channel_dim: where they are, from the end where the rank is known.
        ranks: the numbers of dimensions of its inputs.
        affine: what it does in eval mode, before what it applies after; None where that is unknown.
        reason: why it stays as it is; empty where it does not.
        applies: whether it applies more after that.
    """

    name: str
    channels: int
    channel_dim: int = 1
    affine: Affine | None = None
    reason: str = ""
    applies: bool = False
    ranks: frozenset[int] = frozenset()

    def dim(self, rank: int) -> int:
        """Where the channels are in an input of so many dimensions."""
        return self.channel_dim % rank


def norm_of_layer(layer: nn.Module, name: str, filter: Filter | None) -> Norm | None:
    """What fold knows of a module; None where it is no batch norm."""
    if isinstance(layer, _BatchNorm):
        norm = _of_batch_norm(layer, name)
    elif is_frozen_batch_norm(layer):
        norm = _of_frozen(layer, name)
    else:
        return None
    if filter is not None and not filter(name, layer):
        norm.reason = LEFT_BY_FILTER
    elif not norm.reason and has_hooks(layer):
        norm.reason = "it has hooks"
    return norm


def norms_of_functions(
    functional: FunctionalNorms, names: dict[nn.Module, str], filter: Filter | None
) -> dict[Layer, Norm]:
    """What fold knows of the calls of batch norm as a function; the filter is asked for their modules."""
    norms: dict[Layer, Norm] = {}
    for call, constants in functional.constants.items():
        name = f"batch_norm() in {quoted(call.owner, names[call.owner])}"
        if filter is not None and not filter(names[call.owner], call.owner):
            norms[call] = Norm(name, 0, reason=LEFT_BY_FILTER)
        elif isinstance(constants, str):
            norms[call] = Norm(name, 0, reason=constants)
        else:
            device = next(call.owner.buffers()).device
            affine = Affine(*[values.to(device) for values in Affine.of(*constants)])
            _check_finite(name, affine, constants)
            norms[call] = Norm(name, len(affine.scale), affine=affine)
    for owner, error in functional.errors.items():
        name = f"batch_norm() in {quoted(owner, names[owner])}"
        norms[FunctionalNorm(owner, 0)] = Norm(name, 0, reason=f"torch.fx cannot trace its module: {error}")
    return norms


def replacement(layer: nn.Module, affine: Affine | None, channel_dim: int, with_residual: bool) -> nn.Module:
    """What takes the place of a folded layer; with `affine` it does the arithmetic itself."""
    activation = getattr(layer, "activation", None) if isinstance(layer, _BatchNorm) else None
    activation = activation if isinstance(activation, str) else None
    steps = _named_steps(layer)
    if affine is None and activation is None and not with_residual:
        return (nn.Sequential(steps) if steps else nn.Identity()).eval()
    new: nn.Module
    if affine is None:
        new = ResidualActivation(activation)
    else:
        like = layer.running_mean if layer.weight is None else layer.weight
        assert isinstance(like, Tensor)
        trains = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
        new = MultiplyAdd(affine, like.dtype, channel_dim, activation, trains)
    for name, step in steps.items():
        new.add_module(name, step)
    return new.eval()


def _named_steps(layer: nn.Module) -> OrderedDict[str, nn.Module]:
    """What a layer of a registered class applies after normalising, under the names that it has there."""
    names = {child: name for name, child in layer._modules.items()}
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    for index, step in enumerate(applied(layer)):
        if isinstance(step, nn.Module):
            steps[names.get(step, f"step{index}")] = step
        else:
            steps[f"step{index}"] = ResidualActivation(step) if isinstance(step, str) else Applies(step)
    return steps


def _of_batch_norm(layer: _BatchNorm, name: str) -> Norm:
    channel_dim = getattr(layer, "channel_dim", 1)
    rank = next((rank for kind, rank in _RANKS.items() if isinstance(layer, kind)), None)
    dim = channel_dim if rank is None else channel_dim % rank - rank
    activation = getattr(layer, "activation", None)
    norm = Norm(
        quoted(layer, name), layer.num_features, dim, applies=bool(applied(layer)) or activation is not None
    )
    cls = type(layer).__name__
    if not is_known(type(layer)) or "forward" in vars(layer):
        norm.reason = f"{cls} has a forward of its own: bn.register({cls}, ...) says what it applies after"
    elif layer.training:
        norm.reason = "it stays in training mode after model.eval()"
    elif layer.running_mean is None or layer.running_var is None:
        norm.reason = "without running statistics it normalises by the batch in eval mode too"
    else:
        norm.affine = Affine.of(layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps)
        _check_finite(norm.name, norm.affine, layer)
    return norm


def _of_frozen(layer: nn.Module, name: str) -> Norm:
    found = scale_and_shift_of(layer)
    assert found is not None  # it is frozen
    norm = Norm(quoted(layer, name), len(found[0]), applies=bool(applied(layer)))
    norm.affine = Affine(*[values.to(layer.get_buffer("running_mean").device) for values in found])
    _check_finite(norm.name, norm.affine, layer)
    return norm


def _check_finite(name: str, affine: Affine, of: Any) -> None:
    names = ("running_mean", "running_var", "weight", "bias")
    wrong = [n for n in names if (value := getattr(of, n)) is not None and not bool(value.isfinite().all())]
    if wrong or not affine.is_finite():
        raise ValueError(
            f"fold: the scale or shift of {name} is not finite: look at its "
            f"{', '.join(wrong) or 'running_var'}. Batch norm needs finite values and a variance "
            "of at least 0: recalibrate the model or load other weights"
        )
