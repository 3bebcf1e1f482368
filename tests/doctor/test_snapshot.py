"""A snapshot: everything that a forward may change in a model is put back, in the objects that were there."""

from collections import deque

import pytest
import torch
from torch import Tensor, nn

from batchnorm.doctor.snapshot import Snapshot, unchanged


class Collector(nn.Module):
    """Keeps in containers what it sees, and moves tensors in them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = [torch.zeros(3)]
        self.last: deque[float] = deque([1.0, 2.0], maxlen=2)
        self.shapes = {(1, 3)}
        self.moments: dict[str, list[Tensor]] = {"mean": [torch.zeros(3)]}
        self.running = torch.zeros(3)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        self.seen[0] += 1
        self.seen.append(y)
        self.last.append(float(y.detach().sum()))
        self.shapes.add(tuple(y.shape))
        self.moments["mean"][0] += 1
        self.moments["mean"].append(y.mean(0))
        self.moments["var"] = []
        self.running.mul_(0.9).add_(y.mean(0))
        return y


def held(model: Collector) -> list[object]:
    return [
        [tensor.tolist() for tensor in model.seen],
        list(model.last),
        model.last.maxlen,
        set(model.shapes),
        {name: [tensor.tolist() for tensor in tensors] for name, tensors in model.moments.items()},
        model.running.tolist(),
    ]


def test_containers_that_a_forward_changes_in_place_are_put_back() -> None:
    model = Collector()
    before, objects = held(model), [model.seen, model.last, model.shapes, model.moments, model.running]
    with unchanged(model) as found:
        for _ in range(2):
            model(torch.randn(2, 3)).sum().backward()
            assert len(model.seen) == 2
            assert model.running.requires_grad
            found.restore()
            assert held(model) == before
        model(torch.randn(2, 3))
    assert held(model) == before
    after = [model.seen, model.last, model.shapes, model.moments, model.running]
    assert all(one is other for one, other in zip(after, objects, strict=True))


def test_a_tensor_updated_in_place_leaves_the_graph() -> None:
    model = Collector()
    with unchanged(model):
        model(torch.randn(2, 3))
        assert model.running.grad_fn is not None
    assert model.running.grad_fn is None
    assert not model.running.requires_grad


def test_gradients_keep_their_identity_and_values() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    grad = model.weight.grad
    assert grad is not None
    values = grad.clone()
    with unchanged(model):
        model(torch.ones(1, 2)).sum().backward()
        assert not torch.equal(grad, values)
        model.weight.grad, model.bias.grad = None, torch.ones(2)
    assert model.weight.grad is grad
    assert torch.equal(grad, values)
    assert model.bias.grad is not None
    assert torch.equal(model.bias.grad, torch.ones(2))


def test_values_put_back_do_not_look_changed_to_a_graph() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    output = model(torch.randn(4, 2))
    with unchanged(model):
        for parameter in model.parameters():
            parameter.data.add_(1)
        model(torch.randn(4, 2))
    output.sum().backward()


def test_a_tensor_of_another_dtype_or_shape_gets_its_storage_back() -> None:
    model = nn.BatchNorm1d(3)
    mean, pointer = model.running_mean, model.running_mean.data_ptr()  # type: ignore[union-attr]
    with unchanged(model):
        model.double()
        model.running_var.data = torch.ones(5)  # type: ignore[union-attr]
        del model.num_batches_tracked
        model.extra = torch.ones(2)
    assert model.running_mean is mean
    assert (mean.dtype, mean.data_ptr()) == (torch.float32, pointer)  # type: ignore[union-attr]
    assert model.running_var.shape == (3,)  # type: ignore[union-attr]
    assert sorted(dict(model.named_buffers())) == ["num_batches_tracked", "running_mean", "running_var"]
    assert not hasattr(model, "extra")


def test_hooks_children_classes_and_flags_after_an_exception() -> None:
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2))
    inner = model[0]

    @unchanged(model)
    def spoil() -> None:
        inner.register_forward_hook(lambda module, args, output: None)
        inner.__class__ = Other
        model[0] = nn.ReLU()
        model.eval()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        spoil()
    assert model[0] is inner
    assert type(inner) is nn.Linear
    assert not inner._forward_hooks
    assert model.training
    assert inner.training


def test_the_optimizer_forgets_the_steps_in_between() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = model.weight.tolist()
    snapshot = Snapshot(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 3
    assert model.weight.tolist() != before
    snapshot.restore()
    assert model.weight.tolist() == before
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1
