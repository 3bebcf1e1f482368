"""Other libraries' batch norms for PyTorch on a GPU, timed beside ours where they are installed.

Not among them: what calls torch's operator (timm, inplace_abn's ABN), and what needs several processes
(apex.contrib.cudnn_gbn).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.checks import first_line
from batchnorm.lab.bench_probes import Contender

if TYPE_CHECKING:
    from batchnorm.lab.bench_cases import Case, Shape

# Of a largest value of 1 or more, between outputs that are right: some roundings of each operation.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class Peer:
    """A batch norm of another library.

    Attributes:
        name: in tables.
        module: where it is imported from.
        fits: whether it takes a case, with this shape and dtype.
        make: from its module, the case and the shape, a layer that takes what our benchmark's layers take.
    """

    name: str
    module: str
    fits: Callable[[Case, Shape, torch.dtype], bool]
    make: Callable[[ModuleType, Case, Shape], nn.Module]

    def imported(self) -> ModuleType | None:
        """Its module, or None where it is not installed; raises whatever else importing it does."""
        package = self.module.partition(".")[0]
        if find_spec(package) is None:
            return None
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            # Another package of that name has no such module; one whose extensions are not built, has.
            if error.name is not None and f"{self.module}.".startswith(f"{error.name}."):
                return None
            raise


class _Attorch(nn.Module):
    """Takes residual and activation into its own kernels."""

    def __init__(self, module: ModuleType, case: Case, shape: Shape) -> None:
        super().__init__()
        norm = module.BatchNorm2d if len(shape) == 4 else module.BatchNorm1d
        self.norm = norm(shape[1], act_func=case.activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(x) if residual is None else self.norm(x, residual)


class _ApexGroup(nn.Module):
    """Takes tensors of shape (N, H, W, C), views of ours with the channels last."""

    def __init__(self, module: ModuleType, case: Case, shape: Shape) -> None:
        super().__init__()
        self.norm = module.BatchNorm2d_NHWC(shape[1], fuse_relu=case.activation == "relu")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        last = [None if t is None else t.permute(0, 2, 3, 1) for t in (x, residual)]
        return self.norm(*last).permute(0, 3, 1, 2)


class _ApexSync(nn.Module):
    """By itself in one process; its activation is torch's."""

    def __init__(self, module: ModuleType, case: Case, shape: Shape) -> None:
        super().__init__()
        self.last, self.relu = case.channels_last, case.activation == "relu"
        self.norm = module.SyncBatchNorm(shape[1], channel_last=self.last)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.norm(x)
        return torch.relu(y) if self.relu else y


class _InPlace(nn.Module):
    """Overwrites its input, which a leaf does not bear: a copy, as a convolution's output would be new."""

    def __init__(self, module: ModuleType, case: Case, shape: Shape) -> None:
        super().__init__()
        self.norm = module.InPlaceABN(shape[1], activation="identity")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.clone())


PEERS = (
    Peer(
        "attorch",
        "attorch",
        lambda case, shape, dtype: len(shape) in (2, 3, 4),
        _Attorch,
    ),
    Peer(
        "apex groupbn",
        "apex.contrib.groupbn",
        lambda case, shape, dtype: (
            case.channels_last and len(shape) == 4 and dtype is torch.float16 and shape[1] % 4 == 0
        ),
        _ApexGroup,
    ),
    Peer(
        "apex sync",
        "apex.parallel",
        lambda case, shape, dtype: len(shape) == 4 and not case.residual,
        _ApexSync,
    ),
    Peer(
        "inplace_abn, of a copy",
        "inplace_abn",
        lambda case, shape, dtype: case.activation is None and not case.residual,
        _InPlace,
    ),
)


def contenders(
    case: Case,
    shape: Shape,
    inputs: Sequence[Tensor],
    gradient: Tensor | None,
    expected: Callable[..., Tensor],
    peers: Sequence[Peer] = PEERS,
) -> tuple[dict[str, Contender], list[str]]:
    """The peers that are installed and fit, and why others that ought to run do not.

    Args:
        case, shape: what is timed.
        inputs, gradient: with what.
        expected: the layer that says what is right; for no more than that it is run.
        peers: those to look for.
    """
    found, notes = {}, []
    for peer in peers:
        if not peer.fits(case, shape, inputs[0].dtype):
            continue
        try:
            module = peer.imported()
            if module is None:
                continue
            layer = peer.make(module, case, shape).to(inputs[0].device)
            contender = Contender.training(layer, inputs, gradient)
            _check(layer, expected, inputs)
            contender.call()
            contender.forget()
        except Exception as error:  # whatever another library, or its compiler, may raise
            notes.append(f"{peer.name} failed: {type(error).__name__}: {first_line(error)[:100]}")
        else:
            found[peer.name] = contender
    return found, notes


def _check(layer: nn.Module, expected: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    with torch.no_grad():
        right, actual = expected(*inputs).float(), layer(*inputs).float()
    error = (actual - right).abs().max().item() / max(right.abs().max().item(), 1.0)
    if not error <= _TOLERANCE.get(inputs[0].dtype, 1e-4):
        raise ArithmeticError(f"its output differs from torch.nn's by {error:.2g} of the largest value")
