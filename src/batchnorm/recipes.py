"""Outputs that the backward pass builds again instead of finding them stored: what `memory_efficient` rests on.

While a recording is on, a layer offers its output with a recipe: how to compute it again from tensors that are
stored anyway. Of what later operations save for their backward, the offered outputs are then replaced by their
recipes (torch.autograd.graph.saved_tensors_hooks).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

_recording = threading.local()


class _Recipe(NamedTuple):
    """How to compute an output again: a function of tensors, which must still be as they were."""

    storage: StorageWeakRef
    version: int
    ingredients: tuple[_Stored, ...]
    rebuild: Callable[..., Tensor]


class _Stored(NamedTuple):
    """A tensor that is kept as it is. Behind hooks autograd does not watch its version: we do."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Stored:
        return cls(tensor, tensor._version)

    def unchanged(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a tensor of shape {tuple(self.tensor.shape)} is at version "
                f"{self.tensor._version}; expected version {self.version} instead"
            )
        return self.tensor


class _Rebuilt(NamedTuple):
    """A view of an output that is computed again."""

    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def build(self) -> Tensor:
        whole = self.recipe.rebuild(*[ingredient.unchanged() for ingredient in self.recipe.ingredients])
        if whole.shape == self.size and whole.stride() == self.stride and self.offset == 0:
            return whole
        return whole.as_strided(self.size, self.stride, self.offset)


class Recording(saved_tensors_hooks):
    """Context in which offered outputs are saved for backward as their recipes."""

    def __init__(self) -> None:
        super().__init__(_pack, _unpack)

    def __enter__(self) -> None:
        _recording.recipes = {}
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        _recording.recipes = None


def is_recording() -> bool:
    """Whether an output that is offered now may be replaced by its recipe."""
    return getattr(_recording, "recipes", None) is not None


def offer(y: Tensor, ingredients: tuple[Tensor, ...], rebuild: Callable[..., Tensor]) -> None:
    """Let `y` be saved for backward as `rebuild`, which computes it from the ingredients.

    Not where an ingredient is itself an output with a recipe: rebuilding would go back layer after layer,
    to the start of a residual network.
    """
    if any(_recipe_of(tensor) is not None for tensor in ingredients):
        return
    storage = y.untyped_storage()
    stored = tuple(_Stored.of(tensor.detach()) for tensor in ingredients)
    _recording.recipes[storage._cdata] = _Recipe(StorageWeakRef(storage), y._version, stored, rebuild)


def _recipe_of(tensor: Tensor) -> _Recipe | None:
    try:
        recipe = _recording.recipes.get(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse tensor, a wrapper: it has no storage
        return None
    # A freed storage's address may be another's by now; a version that moved on is another content.
    if recipe is None or recipe.storage.expired() or tensor._version != recipe.version:
        return None
    return recipe


def _pack(tensor: Tensor) -> _Stored | _Rebuilt:
    recipe = _recipe_of(tensor) if is_recording() else None
    if recipe is None:
        return _Stored.of(tensor)
    return _Rebuilt(recipe, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())


def _unpack(saved: _Stored | _Rebuilt) -> Tensor:
    return saved.unchanged() if isinstance(saved, _Stored) else saved.build()
