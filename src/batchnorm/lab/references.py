"""Models, weights and data that a command is given by name: checked before use, and never unpickled."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.checks import first_line
from batchnorm.lab.data import DATASETS, load
from batchnorm.lab.processes import ALONE, World

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
# Where training scripts put the model's state among other things; the last is `batchnorm train`'s.
_MODEL_KEYS = ("state_dict", "model_state_dict", "model")
_SAFETENSORS = ".safetensors"
WEIGHT_FILES = (_SAFETENSORS, ".pt", ".pth")
# What torch.compile puts before the names of a module, and what others do, alone or with each other.
_COMPILED = "_orig_mod."
_WRAPPERS = {"module", "model", ""}
_NAMED = 3


def make_model(reference: str) -> nn.Module:
    """What the function `package.module:factory` returns.

    Raises:
        ValueError: it cannot be found, takes arguments, or returns no module.
    """
    model = _call(reference, "the model")
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model {reference} gives a {type(model).__name__}: expected a torch.nn.Module")
    return model


def make_loader(
    reference: str,
    *,
    data_dir: str | None = None,
    batch_size: int = 256,
    standardize: bool = False,
    max_batches: int | None = None,
    world: World = ALONE,
) -> Iterable[Any]:
    """Training images of a built-in data set in batches, or what `package.module:loader` returns.

    In several processes the batches of a built-in data set, of which there are no more than `max_batches`,
    are dealt out to them; what the function returns is one process's own.

    Raises:
        ValueError: it cannot be found, takes arguments, or cannot be iterated over.
    """
    if reference in DATASETS:
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size} must be 1 or more")
        data = load(reference, data_dir)
        data = data.standardized() if standardize else data
        images = TensorDataset(data.train_images, data.train_labels)
        batches = torch.arange(len(images)).split(batch_size)[:max_batches][world.rank :: world.size]
        return DataLoader(images, batch_sampler=[batch.tolist() for batch in batches])
    if ":" not in reference:
        raise ValueError(
            f"unknown data {reference!r}: expected one of {', '.join(DATASETS)}, or package.module:loader"
        )
    loader = _call(reference, "the loader")
    if not isinstance(loader, Iterable):
        raise ValueError(f"the loader {reference} gives a {type(loader).__name__}: expected batches")
    return loader


def first_input(loader: Iterable[Any], reference: str) -> Tensor:
    """The model's input in the first batch: the batch, or the first of it.

    Raises:
        ValueError: there is no batch, or its first part is no tensor.
    """
    for batch in loader:
        found = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(found, Tensor):
            raise ValueError(
                f"a batch of {reference} begins with a {type(found).__name__}: expected a tensor"
            )
        return found
    raise ValueError(f"{reference} has no batch")


def example_input(shape: str) -> Tensor:
    """Normal numbers in a shape given as 1x3x224x224.

    Raises:
        ValueError: it is not such a shape.
    """
    sizes = shape.split("x")
    if not all(re.fullmatch("[1-9][0-9]{0,8}", size) for size in sizes):
        raise ValueError(f"example {shape!r} must be the sizes of an input, such as 1x3x224x224")
    return torch.randn([int(size) for size in sizes], generator=torch.Generator().manual_seed(0))


def load_weights(model: nn.Module, path: Path) -> str:
    """Load a safetensors file, or a checkpoint of tensors (`weights_only`), into the model.

    A checkpoint is a state_dict, or has one under "state_dict", "model_state_dict" or "model". Its names may
    have what a wrapper has put before them: `module.` (DistributedDataParallel), `model.` (Lightning),
    `_orig_mod.` (torch.compile), or any one prefix under which all of the model's are.

    Returns:
        what was taken off the names and left out, in words; empty where they are the model's.

    Raises:
        ValueError: not such a file, or its tensors are not the model's.
    """
    state = _read_state(path)
    expected = model.state_dict()
    state, said = _without_prefix(path, state, set(expected))
    _check_names(path, set(expected) - set(state), "lacks", "which the model has")
    _check_names(path, set(state) - set(expected), "has", "which the model lacks")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, in the model {tuple(tensor.shape)}"
            )
    model.load_state_dict(state)
    return said


def _without_prefix(path: Path, state: dict[str, Tensor], names: set[str]) -> tuple[dict[str, Tensor], str]:
    """The tensors under the model's names, where these all stand behind one prefix; and what was done."""
    if not names or names <= set(state):
        return state, ""
    compiled = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    if len(compiled) < len(state):
        compiled = state  # the same name twice, once without it
    off = [_COMPILED] if any(_COMPILED in name for name in state) and compiled is not state else []
    first = min(names)
    found = [name.removesuffix(first) for name in compiled if name.endswith(first)]
    prefixes = [prefix for prefix in found if all(prefix + name in compiled for name in names)]
    usual = [prefix for prefix in prefixes if set(prefix.split(".")) <= _WRAPPERS]
    prefixes = usual or prefixes
    if len(prefixes) > 1:
        raise ValueError(
            f"{path} has the model's weights more than once, under {', '.join(sorted(prefixes))}: keep one"
        )
    if not prefixes:
        return state, ""  # the names say what is wrong
    prefix = prefixes[0]
    others = sorted(name for name in compiled if not name.startswith(prefix))
    off += [prefix] if prefix else []
    said = f"took {' and '.join(off)} off the names of the weights"
    if others:
        said += f", and left out {_listed(others)}, which are none of them"
    inside = {name[len(prefix) :]: tensor for name, tensor in compiled.items() if name.startswith(prefix)}
    return inside, said


def weights_as_bytes(model: nn.Module, suffix: str) -> bytes:
    """The model's state_dict as a file with this suffix: .safetensors, .pt or .pth."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if suffix == _SAFETENSORS:
        # A copy each: the format has no tensors that share memory.
        return bytes(safetensors.torch.save({name: tensor.clone() for name, tensor in state.items()}))
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _call(reference: str, what: str) -> Any:
    """Call a function without arguments, by its reference."""
    if _REFERENCE.fullmatch(reference) is None:
        raise ValueError(f"{what} {reference!r} must be given as package.module:function")
    module_name, name = reference.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's module is where the user is
    try:
        function = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what} {reference} cannot be imported: {error}") from None
    except AttributeError:
        raise ValueError(f"{what} {reference}: {module_name} has no {name}") from None
    if not callable(function):
        raise ValueError(f"{what} {reference} is a {type(function).__name__}: expected a function")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{what} {reference} must be a function without arguments: {error}") from None
    return function()


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == _SAFETENSORS:
            return dict(safetensors.torch.load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes that are no checkpoint may raise
        raise ValueError(
            f"{path} is no safetensors file and no checkpoint of tensors alone: {first_line(error)}"
        ) from None
    for key in _MODEL_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no state_dict, nor one under {', '.join(_MODEL_KEYS)}")
    return state


def _check_names(path: Path, names: set[str], verb: str, end: str) -> None:
    if names:
        raise ValueError(f"{path} {verb} {_listed(sorted(names))}, {end}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
