"""memory_efficient: the same gradients to the bit, from less memory, whatever is done to the outputs."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import recipes
from batchnorm.kernels import cpu
from batchnorm.lab.bench_probes import held_bytes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, width, activation="relu"):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (bn.BatchNorm2d(width, activation=activation) for _ in range(2))

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=x)


def stack(width=8, blocks=4, activation="relu"):
    layers = []
    for _ in range(blocks):
        layers += [
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            bn.BatchNorm2d(width, activation=activation),
        ]
    return nn.Sequential(*layers)


class Twice(nn.Module):
    """An output that two convolutions, a pooling and a linear layer by a view have a use for."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = stack(blocks=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8 * 36, 3)

    def forward(self, x):
        y = self.stem(x)
        pooled = F.max_pool2d(y, 2).flatten(1)
        return self.left(y).sin().sum() + self.right(y[:, :, ::2]).cos().sum() + self.linear(pooled).sum()


MODELS = {
    "relu stack": stack,
    "gelu stack": lambda: stack(activation="gelu"),
    "no activation": lambda: stack(activation=None),
    "residual": lambda: nn.Sequential(*[Block(8) for _ in range(4)]),
    "residual silu": lambda: nn.Sequential(*[Block(8, "silu") for _ in range(3)]),
    "twice": Twice,
    "batch norm after batch norm": lambda: nn.Sequential(stack(blocks=1), bn.BatchNorm2d(8), stack(blocks=1)),
    "dropout": lambda: nn.Sequential(stack(blocks=2), nn.Dropout(0.5), stack(blocks=1)),
    "checkpoint inside": lambda: Checkpointed(),
}


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = stack(blocks=2), stack(blocks=2)

    def forward(self, x):
        return self.second(checkpoint(self.first, x, use_reentrant=False))


def gradients(model, x, forward=None):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = (forward or model)(x)
    y.square().sum().backward()
    found = [x.grad, *[parameter.grad for parameter in model.parameters()]]
    model.zero_grad()
    return found


def same(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def on_the_kernel(monkeypatch):
    """Both models on the CPU kernel, where small inputs would otherwise be torch's."""
    monkeypatch.setattr(cpu, "SMALLEST", 1)


@pytest.mark.usefixtures("on_the_kernel")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("train", [True, False])
def test_gradients_to_the_bit(name, train):
    plain = MODELS[name]().train(train)
    lean = bn.memory_efficient(copy.deepcopy(plain))
    x = torch.randn(4, 8, 12, 12)
    same(gradients(plain, x), gradients(lean, x))
    for (name, a), b in zip(plain.state_dict().items(), lean.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.usefixtures("on_the_kernel")
def test_around_a_checkpoint_and_twice_before_the_backward():
    plain = stack()
    lean = bn.memory_efficient(copy.deepcopy(plain))
    x = torch.randn(4, 8, 12, 12)
    for use_reentrant in (True, False):
        wanted = gradients(plain, x)
        same(wanted, gradients(lean, x, lambda x, r=use_reentrant: checkpoint(lean, x, use_reentrant=r)))
    same(
        gradients(plain, x, lambda x: plain(x) + plain(x + 1)),
        gradients(lean, x, lambda x: lean(x) + lean(x + 1)),
    )


@pytest.mark.usefixtures("on_the_kernel")
def test_retain_graph_and_second_derivatives():
    plain = stack(blocks=2).double()
    lean = bn.memory_efficient(copy.deepcopy(plain))
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    y = lean(x).square().sum()
    (first,), (again,) = (torch.autograd.grad(y, x, retain_graph=True) for _ in range(2))
    assert torch.equal(first, again)
    second = []
    for model in (plain, lean):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("on_the_kernel")
def test_in_place_changes_downstream():
    conv = nn.Conv2d(8, 8, 1)

    def saved_before(stem, x):
        y = stem(x)
        z = conv(y)
        y.add_(1)  # the convolution has y as it was
        return z

    def saved_after(stem, x):
        return conv(F.relu_(stem(x).add_(-0.5)))

    plain = stack(blocks=1, activation=None)
    lean = copy.deepcopy(plain)
    x = torch.randn(4, 8, 6, 6)

    class Model(nn.Module):
        def __init__(self, stem, use):
            super().__init__()
            self.stem, self.use = stem, use

        def forward(self, x):
            return self.use(self.stem, x)

    same(gradients(plain, x, lambda x: saved_after(plain, x)),
         gradients(lean, x, bn.memory_efficient(Model(lean, saved_after))))  # fmt: skip
    same(gradients(plain, x, lambda x: conv(plain(x))),
         gradients(lean, x, bn.memory_efficient(Model(lean, saved_before))))  # fmt: skip

    def input_changed(stem, x):
        hidden = stem[0](x)
        y = conv(stem[1](hidden))
        hidden.add_(1)
        return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(lean, x, bn.memory_efficient(Model(lean, input_changed)))


def test_memory_of_a_stack():
    x = torch.randn(8, 16, 32, 32)
    theirs = nn.Sequential(*[nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
                             for _ in range(8)])  # fmt: skip
    lean = bn.memory_efficient(stack(16, 8))
    of = [held_bytes(lambda model=model: model(x.clone()).sum()) for model in (theirs, lean)]
    assert of[1] <= 0.55 * of[0]


def test_memory_of_a_residual_net_and_no_chain_of_rebuilds(monkeypatch):
    depth, deepest = [0], [0]
    original = recipes._Rebuilt.build

    def counted(self):
        depth[0] += 1
        deepest[0] = max(deepest[0], depth[0])
        try:
            return original(self)
        finally:
            depth[0] -= 1

    monkeypatch.setattr(recipes._Rebuilt, "build", counted)
    plain = nn.Sequential(*[Block(8) for _ in range(6)])
    lean = bn.memory_efficient(copy.deepcopy(plain))
    x = torch.randn(8, 8, 32, 32)
    of = [held_bytes(lambda model=model: model(x.clone()).sum()) for model in (plain, lean)]
    assert of[1] < 0.8 * of[0]
    lean(x).sum().backward()
    assert deepest[0] == 1


def test_nothing_stays_alive():
    model = bn.memory_efficient(stack())
    kept = []
    model[1].register_forward_hook(lambda module, args, y: kept.append(weakref.ref(y.untyped_storage())))
    y = model(torch.randn(4, 8, 12, 12))
    y.sum().backward()
    del y
    gc.collect()
    assert kept[0]() is None
    assert not recipes.is_recording()


def test_taken_off_and_copied():
    model = stack()
    hooks = [dict(model._forward_pre_hooks), dict(model._forward_hooks)]
    assert bn.memory_efficient(bn.memory_efficient(model)) is model
    assert len(model._forward_pre_hooks) == 1
    x = torch.randn(4, 8, 6, 6)
    wanted = gradients(model, x)
    same(wanted, gradients(copy.deepcopy(model), x))
    same(wanted, gradients(pickle.loads(pickle.dumps(model)), x))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    same(wanted, gradients(torch.load(buffer, weights_only=False), x))
    bn.memory_efficient(model, enabled=False)
    assert [dict(model._forward_pre_hooks), dict(model._forward_hooks)] == hooks
    with pytest.raises(TypeError, match="expected a model"):
        bn.memory_efficient([model])


def test_a_forward_that_fails_ends_the_recording():
    model = bn.memory_efficient(stack())
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 9, 6, 6))
    assert not recipes.is_recording()
    gradients(model, torch.randn(4, 8, 6, 6))


@pytest.mark.parametrize("train", [True, False])
def test_autocast_and_compile(train):
    plain = stack().train(train)
    lean = bn.memory_efficient(copy.deepcopy(plain))
    x = torch.randn(4, 8, 6, 6)

    def cast(model):
        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x).float()

        return forward

    same(gradients(plain, x, cast(plain)), gradients(lean, x, cast(lean)))
    compiled = torch.compile(lean, backend="eager")
    for a, b in zip(gradients(plain, x), gradients(lean, x, compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
