"""Running a model on fold's example, in its own dtype and in float64, and comparing outputs."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from batchnorm.model.nested import tensors_in
from batchnorm.model.probe import without_processes
from batchnorm.names import quoted

Example = tuple[tuple[Any, ...], dict[str, Any]]


def as_arguments(example: Any) -> Example:
    """`example` as positional and keyword arguments.

    A dict holds keyword arguments, a tuple positional ones; anything else is the only argument.
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if type(example) is tuple else (example,)), {}


@contextmanager
def keep_random_state(model: nn.Module) -> Iterator[None]:
    """Afterwards the random number generators of `model`'s devices are as before."""
    with torch.random.fork_rng(_gpus(model)):
        yield


def _seed(model: nn.Module) -> None:
    # Not torch.manual_seed, which seeds the devices that nobody asked for too.
    torch.random.default_generator.manual_seed(0)
    for index in _gpus(model):
        torch.cuda.default_generators[index].manual_seed(0)


def _gpus(model: nn.Module) -> list[int]:
    tensors = (*model.parameters(), *model.buffers())
    return sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda})


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy without gradients, and of tensors that a graph computed (weight_norm's) the values."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # locks, files, generators: whatever a module may hold
        raise ValueError(
            f"fold: {type(model).__name__} cannot be copied by copy.deepcopy: {error}. Give the attribute it "
            "stumbles over a __deepcopy__, or take it off the model"
        ) from error
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def runnable_copy(model: nn.Module) -> nn.Module:
    """A copy to run and spoil; its SyncBatchNorm, which torch runs on a GPU only, is plain batch norm."""
    copied = copy_of(model)
    for module in copied.modules():
        without_processes(module)
    return copied


def run(model: nn.Module, example: Example) -> Any:
    """The output of `model`, without gradients, of a copy of `example` and always the same random numbers.

    The caller keeps the state of the random number generators.

    Raises:
        ValueError: the forward failed; the message names the innermost layer that did.
    """
    args, kwargs = tree_map(_clone, example)
    _seed(model)
    with torch.no_grad():
        try:
            return model(*args, **kwargs)
        except Exception as error:  # the user's code may raise anything
            where = _innermost(error, model)
            raise ValueError(f"in {where}: {type(error).__name__}: {error}") from error


def run_float64(model: nn.Module, example: Example) -> Any:
    """The output of a model that `to_float64` has changed, for the example in float64."""
    with in_float64():
        return run(model, tree_map(_double, example))


def to_float64(model: nn.Module) -> nn.Module:
    """Change all tensors of `model` to float64, or complex128."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies of what torch.jit made have Parameters that are no leaves
        model._apply(_double)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, _double(value))
    return model


def relative_error(wanted: Any, got: Any, *, exactly: bool = True) -> float:
    """Largest difference of any output tensor, relative to the largest value of the same tensor in `wanted`.

    inf for outputs of another form, for other values that are not finite, and, `exactly`, for integers that
    differ.
    """
    wanted, got = list(tensors_in(wanted)), list(tensors_in(got))
    if len(wanted) != len(got):
        return math.inf
    return max((_error(*pair, exactly) for pair in zip(wanted, got, strict=True)), default=0.0)


def outputs_of(model: nn.Module, names: list[str], run: Callable[[], Any]) -> dict[str, list[Any]]:
    """What the layers called `names` return while `run()` runs."""
    returned: dict[str, list[Any]] = {name: [] for name in names}
    handles = []
    for name in names:

        def hook(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            returned[name].append(tree_map(_clone, output))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return returned


def _error(wanted: Tensor, got: Tensor, exactly: bool) -> float:
    if wanted.shape != got.shape:
        return math.inf
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return math.inf if exactly and not torch.equal(wanted, got) else 0.0
    dtype = torch.complex128 if wanted.is_complex() else torch.float64
    wanted, got = wanted.detach().to(dtype), got.detach().to(dtype)
    finite = wanted.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.allclose(
        wanted[~finite], got[~finite], equal_nan=True
    ):
        return math.inf
    wanted, got = wanted[finite], got[finite]
    if not wanted.numel():
        return 0.0
    largest = wanted.abs().max().item()
    return (wanted - got).abs().max().item() / (largest or 1.0)


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return value.double()
        if value.is_complex():
            return value.to(torch.complex128)
    return value


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, new tensors are float64 where nothing else is said, and casts to less are to float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _CastsToFloat64():
            yield
    finally:
        torch.set_default_dtype(before)


_NARROWER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class _CastsToFloat64(TorchFunctionMode):
    """Casts in a forward, such as `x.float()`, are to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            func = Tensor.double
        return func(*tree_map(_wider, args), **tree_map(_wider, kwargs or {}))


def _wider(value: Any) -> Any:
    return _NARROWER.get(value, value) if isinstance(value, torch.dtype) else value


def _innermost(error: Exception, model: nn.Module) -> str:
    names = {module: name for name, module in model.named_modules()}
    found, trace = model, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names:
            found = owner
        trace = trace.tb_next
    return quoted(found, names[found])
