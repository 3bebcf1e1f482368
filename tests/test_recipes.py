"""Tests of recipes: what is saved as a recipe, what is not, and what is built from it."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from batchnorm import recipes
from batchnorm.recipes import Recording

built: list[Tensor] = []


@pytest.fixture(autouse=True)
def _none_built() -> None:
    built.clear()


class Double(torch.autograd.Function):
    """Twice x, offered with its recipe."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = 2 * x
        if recipes.is_recording():
            recipes.offer(y, (x,), rebuild)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (_,) = ctx.saved_tensors
        return 2 * gradient


def rebuild(x: Tensor) -> Tensor:
    built.append(2 * x)
    return built[-1].clone()


def double(x: Tensor) -> Tensor:
    return Double.apply(x)


def leaf() -> Tensor:
    return torch.arange(6.0).reshape(2, 3).add(1).requires_grad_()


def gradient(use: Callable[[Tensor], Tensor], recording: bool) -> Tensor:
    x = leaf()
    if recording:
        with Recording():
            loss = use(double(x * 1)).sum()
    else:
        loss = use(double(x * 1)).sum()
    loss.backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    ("use", "builds"),
    [
        (lambda y: y.square(), 1),
        (lambda y: y.square() + y.cos(), 2),
        (lambda y: y[1:, ::2].square(), 1),
        (lambda y: y.t().square(), 1),
        (lambda y: y.flatten().square(), 1),
        (lambda y: y[:, 1].unsqueeze(0).expand(4, 2).square(), 1),
        (lambda y: y.exp(), 0),
        (lambda y: y.clone().square(), 0),
        (lambda y: y.add_(1).square(), 0),
        (lambda y: y.relu_().square(), 0),
        (lambda y: y[:, :2].unsqueeze(1).square(), 1),
        (lambda y: torch._neg_view(y).square(), 0),
    ],
)
def test_gradients_are_the_same_and_uses_are_rebuilt(use: Callable[[Tensor], Tensor], builds: int) -> None:
    assert torch.equal(gradient(use, True), gradient(use, False))
    assert len(built) == builds


def test_a_view_as_complex_numbers_is_stored() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    with Recording():
        z = torch.view_as_complex(double(x))
        loss = (z * z.conj()).real.sum()
    loss.backward()
    assert torch.allclose(x.grad, 8 * x.detach())
    assert built == []


def test_an_output_of_which_nothing_else_is_left_is_free() -> None:
    with Recording():
        y = double(leaf() * 1)
        storage = StorageWeakRef(y.untyped_storage())
        z = y.square()
        del y
        assert storage.expired()
    z.sum().backward()
    assert len(built) == 1


def test_outside_nothing_is_offered_or_recorded() -> None:
    assert not recipes.is_recording()
    recipes.offer(torch.ones(2), (), rebuild)
    with Recording():
        assert recipes.is_recording()
    assert not recipes.is_recording()


def test_nested_recordings_share_and_an_exception_restores() -> None:
    with Recording():
        y = double(leaf())
        with Recording():
            inner = y.square()
        with pytest.raises(KeyError), Recording():
            raise KeyError
        assert recipes.is_recording()
        outer = y.square()
    assert not recipes.is_recording()
    (inner + outer).sum().backward()
    assert len(built) == 2


def test_an_output_of_an_output_with_a_recipe_is_stored() -> None:
    x = leaf()
    with Recording():
        loss = double(double(double(x)).square()).sum()
    loss.backward()
    # double(x) has a recipe, and is saved by the second; that one's output is stored for the square.
    assert len(built) == 1
    assert torch.equal(built[0], 2 * x)
    assert torch.equal(x.grad, 2 * 2 * 2 * (4 * x.detach()) * 2)


@pytest.mark.parametrize("moment", ["inside", "after"])
def test_an_ingredient_modified_in_place_is_an_error(moment: str) -> None:
    x = leaf() * 1
    with Recording():
        loss = double(x).square().sum()
        if moment == "inside":
            x.add_(1)
    if moment == "after":
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_stored_tensor_modified_in_place_is_an_error() -> None:
    x, w = leaf(), torch.ones(3, requires_grad=True)
    with Recording():
        loss = (x * w).sum()
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_output_modified_after_it_was_saved_is_rebuilt_as_it_was() -> None:
    x = leaf()
    with Recording():
        y = double(x)
        z = y.square()
        y.add_(100)
        loss = z.sum() + y.square().sum()
    loss.backward()
    assert torch.equal(x.grad, 4 * (2 * x.detach()) + 4 * (2 * x.detach() + 100))


def test_an_operation_that_saves_its_own_output_is_no_cycle() -> None:
    gc.collect()
    with Recording():
        y = (leaf() * 1).exp()
        z = double(y).exp()
    storages = [StorageWeakRef(t.untyped_storage()) for t in (y, z)]
    del y, z
    assert all(storage.expired() for storage in storages)


def test_what_a_long_forward_lets_go_is_freed() -> None:
    storages = []
    with Recording():
        for _ in range(100):
            x = leaf() * 1
            storages.append(StorageWeakRef(x.untyped_storage()))
            double(x).square()
        alive = sum(not storage.expired() for storage in storages)
    assert alive <= 20
    del x
    assert all(storage.expired() for storage in storages)


@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: saved_tensors_hooks(lambda x: x, lambda x: x)])
def test_other_hooks_inside_have_what_is_saved(hooks: Callable[[], Any]) -> None:
    with Recording():
        with hooks():
            assert recipes.others_save()
            assert not recipes.is_recording()
            loss = double(leaf()).square().sum()
        assert recipes.is_recording()
    loss.backward()
    assert built == []


def test_a_torch_that_cannot_tell_of_other_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_top_hooks", None)
    assert not recipes.others_save()
    assert torch.equal(gradient(torch.square, True), gradient(torch.square, False))
    assert len(built) == 1


def test_a_recording_is_of_its_thread() -> None:
    seen = []

    def other() -> None:
        seen.append(recipes.is_recording())
        double(leaf()).square().sum().backward()

    with Recording():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [False]
    assert built == []


def test_sparse_and_other_tensors_without_a_storage_are_stored() -> None:
    sparse = torch.eye(3).to_sparse().requires_grad_()
    x = torch.ones(3, 2, requires_grad=True)
    with Recording():
        loss = torch.sparse.mm(sparse, double(x)).sum()
    loss.backward()
    assert torch.equal(x.grad, torch.full((3, 2), 2.0))
    assert len(built) == 1
