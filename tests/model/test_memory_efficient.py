"""Tests of memory_efficient: the gradients of the model without it, to the bit, from less memory."""

import copy
import gc
import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import recipes
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu.plan import plan
from batchnorm.lab.bench_nets import OURS, TAILS, TORCH, ResNet18
from batchnorm.lab.bench_probes import held_bytes

C = 4


@pytest.fixture(autouse=True)
def _seed_and_one_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # With and without the verb by the same kernel: else a last bit may differ.
    monkeypatch.setattr(cpu, "pays", lambda *call: True)
    if not cpu._work():
        pytest.skip("the CPU kernels do not run here")
    torch.manual_seed(0)
    yield
    assert not recipes.is_recording()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the outputs that were rebuilt."""
    shapes: list[tuple[int, ...]] = []
    again = cpu.Call.again

    def counted(self: Any, x: Tensor, residual: Tensor | None) -> Tensor:
        shapes.append(tuple(x.shape))
        return again(self, x, residual)

    monkeypatch.setattr(cpu.Call, "again", counted)
    return shapes


def conv(before: int = C, after: int = C) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=False)


def norm(activation: str | None = "relu") -> nn.Module:
    return bn.BatchNorm2d(C, activation=activation)


def stack(*, blocks: int = 2, activation: str | None = "relu") -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(blocks) for layer in (conv(), norm(activation))], conv())


def images(n: int = 3, size: int = 6) -> Tensor:
    return torch.randn(n, C, size, size, generator=torch.Generator().manual_seed(1))


class Of(nn.Module):
    """A model whose forward is a function of its layers and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Block(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(), norm(activation)
        self.conv2, self.bn2 = conv(), norm(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=x)


def residual_net(activation: str, blocks: int) -> nn.Module:
    return nn.Sequential(conv(), norm(activation), *[Block(activation) for _ in range(blocks)], conv())


def loss_of(out: Any) -> Tensor:
    outputs = out if isinstance(out, tuple) else (out,)
    return sum((output.sin() * output).sum() for output in outputs)  # type: ignore[return-value]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The loss, and gradients of the input and the parameters."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    loss = loss_of(model(x))
    found = torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)
    return [loss.detach(), *(gradient for gradient in found if gradient is not None)]


def assert_same(ours: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(ours) == len(wanted)
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)


def assert_same_gradients(model: nn.Module, x: Tensor | None = None) -> None:
    x = images() if x is None else x
    efficient = bn.memory_efficient(copy.deepcopy(model))
    assert_same(gradients(efficient, x), gradients(model, x))
    for a, b in zip(efficient.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    return held_bytes(lambda: model(x).sum())


# The models: how many outputs are rebuilt, by one backward pass, is the number beside each.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "stack": (stack, 2),
    "stack gelu": (lambda: stack(activation="gelu"), 2),
    "stack silu": (lambda: stack(activation="silu"), 2),
    "stack without activation": (lambda: stack(activation=None), 2),
    "stack softplus, which is not fused": (lambda: stack(activation="softplus"), 2),
    # Every second block's output, by its convolution and by its own slope.
    "residual relu": (lambda: residual_net("relu", 3), 6),
    "residual gelu": (lambda: residual_net("gelu", 3), 7),
    "residual silu": (lambda: nn.Sequential(*[Block("silu") for _ in range(2)], conv()), 4),
    "used twice": (
        lambda: Of(lambda m, x: m.c2(y := m.b(m.c1(x))) * m.c3(y), c1=conv(), b=norm(), c2=conv(), c3=conv()),
        2,
    ),
    "flattened": (lambda: nn.Sequential(conv(), norm(), nn.Flatten(), nn.Linear(C * 36, 5)), 1),
    "sliced": (
        lambda: Of(lambda m, x: m.c2(m.b(m.c1(x))[1:, :, ::2, 1:]), c1=conv(), b=norm(), c2=conv()),
        1,
    ),
    "transposed": (lambda: Of(lambda m, x: m.c2(m.b(m.c1(x)).mT), c1=conv(), b=norm(), c2=conv()), 1),
    "pooled": (lambda: nn.Sequential(conv(), norm(), nn.MaxPool2d(2), conv()), 1),
    "dropout": (lambda: nn.Sequential(conv(), norm(), nn.Dropout(0.5), conv()), 0),
    "returned": (lambda: Of(lambda m, x: ((y := m.b(m.c1(x))), m.c2(y)), c1=conv(), b=norm(), c2=conv()), 1),
    "after another": (lambda: nn.Sequential(conv(), norm("relu"), norm("silu"), norm(None), conv()), 2),
    "first": (lambda: nn.Sequential(norm(), conv()), 1),
    "changed in place before": (
        lambda: Of(lambda m, x: m.c2(m.b(m.c1(x)).add_(1)), c1=conv(), b=norm(), c2=conv()),
        0,
    ),
    "relu_ after": (lambda: nn.Sequential(conv(), norm(None), nn.ReLU(inplace=True), conv()), 0),
    "ghost": (
        lambda: nn.Sequential(conv(), bn.BatchNorm2d(C, activation="relu", ghost_batch_size=1), conv()),
        0,
    ),
    "torch.nn's": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), conv()), 0),
    "float64": (lambda: stack().double(), 2),
    "channels last": (lambda: stack().to(memory_format=torch.channels_last), 2),
}


@pytest.mark.parametrize(("make", "rebuilt"), MODELS.values(), ids=MODELS)
def test_gradients_are_the_same_to_the_bit(
    make: Callable[[], nn.Module], rebuilt: int, built: list[Any], request: pytest.FixtureRequest
) -> None:
    model = make()
    x = images().to(next(model.parameters()).dtype)
    if "channels last" in request.node.name:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same_gradients(model, x)
    assert len(built) == rebuilt


@pytest.mark.parametrize(("make", "rebuilt"), [MODELS["stack"], MODELS["residual relu"]])
def test_in_eval_mode(make: Callable[[], nn.Module], rebuilt: int, built: list[Any]) -> None:
    model = make()
    model(images())
    assert_same_gradients(model.eval())
    assert len(built) == rebuilt


def all_hooks(model: nn.Module) -> list[Any]:
    return [model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called]


def test_returns_the_model_changes_nothing_else_and_can_be_taken_off() -> None:
    model = stack()
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda *_: calls.append("after"))
    hooks = [dict(each) for each in all_hooks(model)]
    parameters, state = [id(p) for p in model.parameters()], copy.deepcopy(model.state_dict())
    model[1].eval()
    assert bn.memory_efficient(model) is model
    once = [list(each) for each in all_hooks(model)]
    assert bn.memory_efficient(model) is model
    assert [list(each) for each in all_hooks(model)] == once
    assert [id(p) for p in model.parameters()] == parameters
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model.training
    assert not model[1].training
    model(images())
    assert calls == ["before", "after"]
    for _ in range(2):
        assert bn.memory_efficient(model, enabled=False) is model
        assert [dict(each) for each in all_hooks(model)] == hooks


@pytest.mark.parametrize("wrong", [None, 3, [nn.ReLU()], nn.ReLU])
def test_what_is_no_module(wrong: Any) -> None:
    wanted = rf"memory_efficient: expected a model \(torch.nn.Module\), got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=wanted):
        bn.memory_efficient(wrong)


def test_taken_off_it_saves_as_before(built: list[Any]) -> None:
    model = bn.memory_efficient(bn.memory_efficient(stack()), enabled=False)
    gradients(model, images())
    assert built == []


def test_a_layer_by_itself(built: list[Any]) -> None:
    layer, after = bn.memory_efficient(norm()), conv()
    x = images().requires_grad_()
    after(layer(x, residual=images())).sum().backward()
    assert built == [tuple(x.shape)]  # for its own slope: the convolution has saved it after the recording


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(context: Callable[[], Any]) -> None:
    seen: list[bool] = []
    model = stack()
    model[0].register_forward_hook(lambda *_: seen.append(recipes.is_recording()))
    bn.memory_efficient(model)
    with context():
        model(images())
    assert seen == [False]
    model(images())
    assert seen == [False, True]


def test_in_half_precision_under_autocast() -> None:
    x, model = images(4, 16), stack()
    efficient = bn.memory_efficient(copy.deepcopy(model))

    def run(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().sum()

    torch.set_autocast_cache_enabled(False)
    try:
        for m in (model, efficient):
            run(m).backward()
        assert held_bytes(lambda: run(efficient)) <= held_bytes(lambda: run(model))
    finally:
        torch.set_autocast_cache_enabled(True)
    for a, b in zip(efficient.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_two_backward_passes(built: list[Any]) -> None:
    model = stack()
    efficient = bn.memory_efficient(copy.deepcopy(model))
    for m in (model, efficient):
        loss = loss_of(m(images()))
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    assert_same([p.grad for p in efficient.parameters()], [p.grad for p in model.parameters()])
    assert len(built) == 4


def test_two_forwards_before_their_backwards() -> None:
    model = stack()
    efficient = bn.memory_efficient(copy.deepcopy(model))
    for m in (model, efficient):
        first, second = loss_of(m(images())), loss_of(m(images() + 1))
        first.backward()
        second.backward()
    assert_same([p.grad for p in efficient.parameters()], [p.grad for p in model.parameters()])


def test_a_second_derivative() -> None:
    model = stack(activation="silu")
    efficient = bn.memory_efficient(copy.deepcopy(model))
    found = []
    for m in (model, efficient):
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(m(x)), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), [x, *m.parameters()]))
    assert_same(list(found[1]), list(found[0]))


def test_a_batch_of_gradients() -> None:
    model = stack()
    efficient = bn.memory_efficient(copy.deepcopy(model))
    found = []
    for m in (model, efficient):
        x = images().requires_grad_()
        y = m(x)
        vectors = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(4))
        found.append(torch.autograd.grad(y, x, vectors, is_grads_batched=True)[0])
    torch.testing.assert_close(found[1], found[0])


def test_an_output_changed_in_place_after_it_was_saved() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.c1(x))
        z = m.c2(y)
        y.add_(1)
        return z

    model = Of(forward, c1=conv(), b=norm(), c2=conv())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, images())
    unchanged = Of(lambda m, x: m.c2(m.b(m.c1(x))), **dict(copy.deepcopy(model).named_children()))
    assert_same(gradients(bn.memory_efficient(model), images()), gradients(unchanged, images()))


def test_an_input_changed_in_place_is_autograds_error() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.c1(x)
        y = m.c2(m.b(x))
        x.add_(1)
        return y

    model = Of(forward, c1=conv(), b=norm(), c2=conv())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(model, images())
        bn.memory_efficient(model)


def test_a_batch_norms_parameters_changed_before_the_backward() -> None:
    model = stack()
    found = []
    for m in (model, bn.memory_efficient(copy.deepcopy(model))):
        loss = loss_of(m(images()))
        with torch.no_grad():
            for layer in (m[1], m[3]):
                layer.weight.add_(1)
                layer.bias.add_(1)
                layer.running_mean.add_(1)
        loss.backward()
        found.append([p.grad for p in m.parameters()])
    assert_same(found[1], found[0])


def test_other_parameters_changed_before_the_backward() -> None:
    model = bn.memory_efficient(stack())
    loss = loss_of(model(images()))
    loss.backward(retain_graph=True)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Checkpointed(nn.Module):
    def __init__(self, part: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.before, self.part, self.after = stack(blocks=1), part, stack(blocks=1)
        self.b = norm()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.before(x))
        return self.after(checkpoint(self.part, x, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_checkpoint_inside(use_reentrant: bool, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Checkpointed(nn.Sequential(stack(), norm()), use_reentrant)
    efficient = bn.memory_efficient(copy.deepcopy(model))
    if nested:
        bn.memory_efficient(efficient.part)
    assert_same(by_backward(efficient), by_backward(model))
    # Small inputs go by another kernel outside a recording, and it must be the same one both times.
    monkeypatch.setattr(cpu, "pays", lambda *call: False)
    by_backward(efficient)


def by_backward(model: nn.Module) -> list[Tensor]:
    """As `gradients`, for what takes no torch.autograd.grad: a reentrant checkpoint, DDP."""
    model.zero_grad()
    x = images().requires_grad_()
    loss_of(model(x)).backward()
    return [x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around(use_reentrant: bool, built: list[Any]) -> None:
    model = stack()
    efficient = bn.memory_efficient(copy.deepcopy(model))
    found = []
    for m in (model, efficient):
        x = images().requires_grad_()
        loss_of(checkpoint(m, x, use_reentrant=use_reentrant)).backward()
        found.append([x.grad, *(p.grad for p in m.parameters())])
    assert_same(found[1], found[0])
    assert len(built) == (2 if use_reentrant else 0)


@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: saved_tensors_hooks(lambda x: x, lambda x: x)])
def test_other_hooks_around_have_what_is_saved(hooks: Callable[[], Any], built: list[Any]) -> None:
    model = stack()
    wanted = gradients(model, images())
    bn.memory_efficient(model)
    with hooks():
        ours = gradients(model, images())
    assert_same(ours, wanted)
    assert built == []
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_same(gradients(model, images()), wanted)
    assert built == []


def test_a_part_inside_a_whole(built: list[Any]) -> None:
    model = nn.Sequential(stack(), norm(), stack())
    wanted = gradients(model, images())
    bn.memory_efficient(model[2])
    assert_same(gradients(model, images()), wanted)
    assert len(built) == 2
    bn.memory_efficient(model)
    assert_same(gradients(model, images()), wanted)
    assert len(built) == 2 + 5


def test_a_model_that_calls_itself(built: list[Any]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.c2(m.b(m.c1(x)))
        m.depth += 1
        x = m(x) if m.depth < 3 else x
        m.depth -= 1
        return m.c2(m.b(x))

    model = Of(forward, c1=conv(), b=norm(), c2=conv())
    model.depth = 0  # type: ignore[assignment]
    assert_same_gradients(model)
    assert len(built) == 6


class Interrupted(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.b, self.c, self.error = norm(), conv(), error

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        y = self.b(x)
        if fail:
            raise self.error
        return self.c(y)


@pytest.mark.parametrize("where", ["forward", "pre-hook", "first pre-hook", "hook", "inner"])
def test_an_error_ends_it(where: str, built: list[Any]) -> None:
    fail = True

    def hook(*_: Any) -> None:
        if fail:
            raise ZeroDivisionError

    model = bn.memory_efficient(Interrupted(ZeroDivisionError))
    if where == "inner":
        model = bn.memory_efficient(nn.Sequential(model))
        model[0].b.register_forward_hook(hook)
    elif where != "forward":
        register = model.register_forward_hook if where == "hook" else model.register_forward_pre_hook
        register(hook, prepend=where == "first pre-hook")  # type: ignore[operator]
    with pytest.raises(ZeroDivisionError):
        model(images(), **({"fail": True} if where == "forward" else {}))
    assert not recipes.is_recording()
    fail = False
    gradients(model, images())
    assert len(built) == 1


def test_an_error_of_a_part_that_the_whole_survives(built: list[Any]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with pytest.raises(ZeroDivisionError):
            m.part(x, fail=True)
        assert recipes.is_recording()
        return m.part(x)

    part = bn.memory_efficient(Interrupted(ZeroDivisionError))
    part.register_forward_pre_hook(lambda *_: None, prepend=True)
    gradients(bn.memory_efficient(Of(forward, part=part)), images())
    assert len(built) == 1


def test_a_keyboard_interrupt_is_ended_by_the_next_forward(built: list[Any]) -> None:
    # torch calls no hook then.
    part = bn.memory_efficient(Interrupted(KeyboardInterrupt))
    model = bn.memory_efficient(nn.Sequential(part, norm(), conv()))
    with pytest.raises(KeyboardInterrupt):
        part(images(), fail=True)
    assert recipes.is_recording()
    gradients(model, images())
    assert not recipes.is_recording()
    assert len(built) == 2


def test_threads(built: list[Any]) -> None:
    model = bn.memory_efficient(stack().eval())
    wanted = gradients(model, images())
    found: list[list[Tensor]] = []
    barrier = threading.Barrier(3)
    model[1].register_forward_hook(lambda *_: (barrier.wait(20), None)[1])

    def run() -> None:
        torch.set_num_threads(1)
        x = images().requires_grad_()
        loss = loss_of(model(x))
        found.append([loss.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for gradients_ in found:
        assert_same(gradients_, wanted)
    assert len(built) == 4 * 2


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_copies_keep_it(way: str, built: list[Any]) -> None:
    model = bn.memory_efficient(stack())
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_same(gradients(other, images()), gradients(model, images()))
    assert len(built) == 4
    bn.memory_efficient(other, enabled=False)
    assert not other._forward_hooks
    assert not other._forward_pre_hooks
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1


def test_hooks_of_a_loaded_model_are_not_overwritten(tmp_path: Path) -> None:
    # torch numbers hooks from 0 in each process, and loads their numbers as they were.
    path = tmp_path / "model.pt"
    torch.save(bn.memory_efficient(nn.Sequential(conv(), norm(), conv())), path)
    code = (
        f"import torch; from batchnorm import recipes; m = torch.load({str(path)!r}, weights_only=False)\n"
        "n = max(*m._forward_hooks, *m._forward_pre_hooks) + 1; nothing = lambda *_: None\n"
        "for _ in range(n): m.register_forward_hook(nothing)\n"
        "m(torch.randn(2, 4, 6, 6)); assert not recipes.is_recording()\n"
        "print(len(m._forward_hooks) - n, len(m._forward_pre_hooks))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.split() == ["1", "1"], out.stderr


def test_functional_call_and_a_transform() -> None:
    model = stack().eval()
    parameters = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    x = images()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(model, parameters, (x,)))

    def by_autograd() -> list[Tensor]:
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        return list(torch.autograd.grad(loss(leaves), leaves.values()))

    wanted = by_autograd(), torch.func.grad(loss)(parameters)
    bn.memory_efficient(model)
    assert_same(by_autograd(), wanted[0])
    torch.testing.assert_close(torch.func.grad(loss)(parameters), wanted[1], rtol=0, atol=0)
    per_sample = torch.func.vmap(lambda x: model(x.unsqueeze(0)))(x)
    torch.testing.assert_close(per_sample.squeeze(1), model(x))
    (_, tangent), (_, wanted_tangent) = (
        torch.func.jvp(bn.memory_efficient(model, enabled), (x,), (x,)) for enabled in (True, False)
    )
    torch.testing.assert_close(tangent, wanted_tangent)


def test_a_transform_inside_is_torchs_error() -> None:
    linear = nn.Linear(3, 3)
    model = bn.memory_efficient(
        Of(lambda m, x: torch.func.grad(lambda x: m.linear(x).sum())(x), linear=linear)
    )
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        model(torch.randn(3))
    torch.testing.assert_close(bn.memory_efficient(model, False)(torch.randn(3)), linear.weight.sum(0))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("whole", [True, False])
def test_torch_compile(backend: str, whole: bool, built: list[Any]) -> None:
    model = stack()
    wanted = gradients(copy.deepcopy(model), images())
    torch.compiler.reset()
    if whole:
        compiled = torch.compile(bn.memory_efficient(model), backend=backend, fullgraph=True)
        rebuilt = 0
    else:
        model[2] = torch.compile(model[2], backend=backend)
        compiled = bn.memory_efficient(model)
        rebuilt = 2
    try:
        for found, same in zip(gradients(compiled, images()), wanted, strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-4)
    finally:
        torch.compiler.reset()
    assert len(built) == rebuilt


@pytest.mark.usefixtures("group_of_one")
def test_distributed_data_parallel(built: list[Any]) -> None:
    model = stack()
    parallel = nn.parallel.DistributedDataParallel(bn.memory_efficient(copy.deepcopy(model)))
    outside = bn.memory_efficient(nn.parallel.DistributedDataParallel(copy.deepcopy(model)))
    for _ in range(2):
        wanted = by_backward(model)
        for m in (parallel, outside):
            assert_same(by_backward(m), wanted)
    assert len(built) == 2 * 2 * 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace() -> None:
    model = stack().eval()
    x = images()
    wanted = model(x)
    traced = torch.jit.trace(bn.memory_efficient(model), x)
    torch.testing.assert_close(traced(x), wanted)


def test_a_stack_saves_half() -> None:
    x = torch.zeros(4, C, 24, 24)
    plain = nn.Sequential(*[layer for _ in range(8) for layer in (conv(), nn.BatchNorm2d(C), nn.ReLU())])
    ours = stack(blocks=8)[:-1]
    efficient = bn.memory_efficient(copy.deepcopy(ours))
    assert saved_bytes(efficient, x) <= 0.55 * saved_bytes(plain, x)
    assert saved_bytes(efficient, x) <= 0.6 * saved_bytes(ours, x)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_residual_network_saves_less_and_no_rebuild_asks_for_another(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths, depth = [], 0
    build = recipes._Rebuilt.build

    def counted(self: Any) -> Tensor:
        nonlocal depth
        depth += 1
        depths.append(depth)
        try:
            return build(self)
        finally:
            depth -= 1

    monkeypatch.setattr(recipes._Rebuilt, "build", counted)
    model = residual_net(activation, 8)
    efficient = bn.memory_efficient(copy.deepcopy(model))
    x = images(4, 24)
    assert saved_bytes(efficient, x) < 0.75 * saved_bytes(model, x)
    gradients(efficient, x)
    assert set(depths) == {1}


def test_resnet_18() -> None:
    x = torch.randn(4, 3, 32, 32)
    models = {name: ResNet18(TAILS[name], width=4) for name in (TORCH, OURS)}
    efficient = bn.memory_efficient(copy.deepcopy(models[OURS]))
    assert_same(gradients(efficient, x), gradients(models[OURS], x))
    assert saved_bytes(efficient, x) < 0.8 * saved_bytes(models[TORCH], x)


def test_saves_no_more_where_it_cannot_help() -> None:
    model = nn.Sequential(norm(None), nn.Flatten(), nn.Linear(C * 24 * 24, 2, bias=False))
    x = torch.zeros(4, C, 24, 24)
    efficient = bn.memory_efficient(copy.deepcopy(model))
    assert saved_bytes(efficient, x) <= saved_bytes(model, x) / 1.9
    for other in (
        Block("relu"),
        Block("gelu"),
        nn.Sequential(norm("relu"), norm("gelu"), norm(None), conv()),
    ):
        efficient = bn.memory_efficient(copy.deepcopy(other))
        assert saved_bytes(efficient, x) <= saved_bytes(other, x)


def test_everything_is_freed() -> None:
    storages: list[StorageWeakRef] = []
    layers = stack(), norm(), Block("relu"), Block("gelu"), nn.Sigmoid(), conv()
    model = bn.memory_efficient(nn.Sequential(*layers))
    for layer in model.modules():
        layer.register_forward_hook(lambda m, args, y: storages.append(StorageWeakRef(y.untyped_storage())))
    gc.collect()
    gc.disable()
    try:
        loss = loss_of(model(images()))
        assert not all(s.expired() for s in storages)
        loss.backward()
        # The graph is still there, what it had saved is not.
        assert sum(not s.expired() for s in storages) == 0
        storages.clear()
        loss = loss_of(model(images()))
        del loss
        assert all(s.expired() for s in storages)
    finally:
        gc.enable()


def test_many_steps_do_not_grow() -> None:
    model = bn.memory_efficient(nn.Sequential(stack(), norm(), Block("relu"), conv()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def steps(n: int) -> int:
        for _ in range(n):
            optimizer.zero_grad()
            loss_of(model(images())).backward()
            optimizer.step()
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    plan.cache_clear()  # a full cache may shrink
    assert steps(20) <= steps(2)


def test_a_frozen_layer_whose_input_is_changed_in_place() -> None:
    # Nothing of the layer is saved then, so its output must be.
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.detach().clone()
        y = m.b(x)
        x.zero_()
        return m.c(y)

    model = Of(forward, b=norm().requires_grad_(False), c=conv())
    efficient = bn.memory_efficient(copy.deepcopy(model))
    for m in (model, efficient):
        loss_of(m(images())).backward()
    assert torch.equal(efficient.c.weight.grad, model.c.weight.grad)


def test_an_activation_after_it_in_torch(built: list[Any]) -> None:
    model = Of(lambda m, x: m.c2(F.silu(m.b(m.c1(x)))), c1=conv(), b=norm(None), c2=conv())
    assert_same_gradients(model)
    assert len(built) == 1
