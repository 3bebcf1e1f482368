"""Outputs that the backward pass builds again instead of finding them stored, for `memory_efficient`.

While a recording is on, a layer offers its output with a recipe: how to compute it again from tensors that
are stored anyway. Of what later operations save for their backward, the offered outputs are then replaced by
their recipes (torch.autograd.graph.saved_tensors_hooks).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class _Stored(NamedTuple):
    """A tensor that is kept as it is. Behind hooks autograd does not watch its version: we do."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Stored:
        # Detached: the output of an operation would keep alive the node that it is saved in.
        return cls(tensor.detach(), tensor._version)

    def unchanged(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a tensor of shape {tuple(self.tensor.shape)} is at version "
                f"{self.tensor._version}; expected version {self.version} instead"
            )
        return self.tensor


class _Recipe(NamedTuple):
    """How to compute an output again: a function of tensors, which must still be as they were."""

    storage: StorageWeakRef
    version: int
    dtype: torch.dtype
    ingredients: tuple[_Stored, ...]
    rebuild: Callable[..., Tensor]


class _Rebuilt(NamedTuple):
    """A view of an output that is computed again."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def build(self) -> Tensor:
        whole = self.recipe.rebuild(*[ingredient.unchanged() for ingredient in self.recipe.ingredients])
        return whole.as_strided(self.size, self.stride, self.offset)


class _Recording(threading.local):
    # By the address of an output's storage, which stays taken as long as there is a weak reference to it.
    recipes: dict[int, _Recipe] | None = None


_recording = _Recording()


class Recording(saved_tensors_hooks):
    """Context in which offered outputs are saved as their recipes; one inside another changes nothing."""

    def __init__(self) -> None:
        super().__init__(_pack, _unpack)

    def __enter__(self) -> None:
        super().__enter__()
        self._outer = _recording.recipes
        if self._outer is None:
            _recording.recipes = {}

    def __exit__(self, *error: object) -> None:
        _recording.recipes = self._outer
        super().__exit__(*error)


def is_recording() -> bool:
    """Whether an output that is offered now may be replaced by its recipe."""
    return _recording.recipes is not None and not others_save()


def others_save() -> bool:
    """Whether other hooks, such as a checkpoint's, get what is saved; no where torch cannot tell."""
    hooks = None if _top_hooks is None else _top_hooks(True)
    return hooks is not None and hooks[0] is not _pack


def offer(y: Tensor, ingredients: tuple[Tensor, ...], rebuild: Callable[..., Tensor]) -> None:
    """Let `y`, new and alone in its memory, be saved as `rebuild`, which computes it from the ingredients.

    Not where an ingredient is itself an output with a recipe: rebuilding would go back layer after layer,
    to the start of a residual network.
    """
    recipes = _recording.recipes
    if recipes is None or any(_recipe_of(tensor) is not None for tensor in ingredients):
        return
    if len(recipes) % _PRUNE_EVERY == _PRUNE_EVERY - 1:
        # A forward may be a long loop; the recipes of what it has let go keep their ingredients alive.
        for address in [address for address, recipe in recipes.items() if recipe.storage.expired()]:
            del recipes[address]
    storage = y.untyped_storage()
    stored = tuple(map(_Stored.of, ingredients))
    recipes[storage._cdata] = _Recipe(StorageWeakRef(storage), y._version, y.dtype, stored, rebuild)


_PRUNE_EVERY = 16


def _recipe_of(tensor: Tensor) -> _Recipe | None:
    assert _recording.recipes is not None
    try:
        recipe = _recording.recipes.get(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse tensor, a wrapper: it has no storage
        return None
    if (
        recipe is None
        or tensor._version != recipe.version  # its content is another by now
        or tensor.dtype != recipe.dtype  # a view as other numbers
        or tensor.is_neg()
    ):
        return None
    return recipe


def _pack(tensor: Tensor) -> Any:
    recipe = None if _recording.recipes is None else _recipe_of(tensor)
    if recipe is None:
        return _Stored.of(tensor)
    return _Rebuilt(recipe, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: _Stored | _Rebuilt) -> Tensor:
    return saved.unchanged() if isinstance(saved, _Stored) else saved.build()
