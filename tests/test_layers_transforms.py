"""Tests of the layers under checkpointing, torch.compile, torch.func, autograd's other modes and autocast."""

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, stack_module_state
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

C = 3
# float32, through other kernels (traced, batched, reference) than the eager layer's: other orders of
# summation, with roundings of 6e-8 each.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum=None": {"momentum": None},
    "activation": {"activation": "silu"},
    "ghost_batch_size": {"ghost_batch_size": 4},
    "renorm": {"renorm": (1.5, 0.5)},
    "correction": {"correction": 0},
    "skip_nonfinite": {"skip_nonfinite": True},
    "no affine": {"affine": False},
    "no tracking": {"track_running_stats": False},
    "channel_dim": {"channel_dim": -1},
    "everything": {
        "momentum": None,
        "activation": "tanh",
        "ghost_batch_size": 4,
        "renorm": True,
        "channel_dim": -1,
        "correction": 0,
        "skip_nonfinite": True,
    },
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomize(model: nn.Module) -> nn.Module:
    """Other Parameters and running statistics than a new layer's ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if name.endswith("var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.ndim:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def small(norm: type[nn.Module] = bn.BatchNorm1d, **options: Any) -> nn.Sequential:
    """Linear, batch norm, Linear: statistics that depend on Parameters, and a loss that depends on them."""
    # The layer takes a bias before it away: its gradient would be the rounding of zero.
    return nn.Sequential(nn.Linear(C, C, bias=False), norm(C, **options), nn.Tanh(), nn.Linear(C, C))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------------------- activation checkpointing


def step(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Any]:
    """One forward and backward: everything that may depend on how the forward was run."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = forward(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, "gradients": gradients(model), "buffers": buffers(model)}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_statistics_move_once_under_checkpointing(options: dict[str, Any], use_reentrant: bool) -> None:
    plain = randomize(small(**options))
    saved = copy.deepcopy(plain)
    for number in (1, 2, 3):
        x = torch.randn(8, C)
        wanted = step(plain, plain, x)
        got = step(saved, lambda x: checkpoint(saved, x, use_reentrant=use_reentrant), x)
        if saved[1].renorm is not None:
            del got["x"], got["gradients"], wanted["x"], wanted["gradients"]  # the next test's
        assert_close(got, wanted, rtol=0, atol=0)
        if saved[1].track_running_stats:
            assert saved[1].num_batches_tracked == number


@pytest.mark.xfail(strict=True, reason="run again, renorm corrects towards statistics that have moved since")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_renorms_gradients_under_checkpointing(use_reentrant: bool) -> None:
    plain = randomize(small(renorm=(1.5, 0.5)))
    saved = copy.deepcopy(plain)
    x = torch.randn(8, C)
    wanted = step(plain, plain, x)
    got = step(saved, lambda x: checkpoint(saved, x, use_reentrant=use_reentrant), x)
    assert_close(got, wanted, **CLOSE)


@pytest.mark.xfail(strict=True, reason="compiled code cannot see that a backward pass runs it")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_statistics_move_once_when_a_checkpoint_runs_compiled_code(use_reentrant: bool) -> None:
    torch._dynamo.reset()
    model = small()
    forward = torch.compile(model, backend="aot_eager")
    step(model, lambda x: checkpoint(forward, x, use_reentrant=use_reentrant), torch.randn(8, C))
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_torchs_layer_moves_twice_under_checkpointing(use_reentrant: bool) -> None:
    # pytorch#96136: should this fail, torch has been mended and the rule here can be simpler.
    model = small(nn.BatchNorm1d)
    step(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant), torch.randn(8, C))
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("shape", [(8, C, 5), (8, C, 4, 3), (4, C, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("inputs", [(), ("residual",), ("mask",), ("residual", "mask")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_a_layer_with_its_inputs(
    dtype: torch.dtype, inputs: tuple[str, ...], shape: tuple[int, ...], use_reentrant: bool
) -> None:
    layer = {3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}[len(shape)](C, activation="relu")
    plain, saved = randomize(layer), copy.deepcopy(layer)
    given = {"residual": torch.randn(shape, dtype=dtype), "mask": torch.rand(shape[0], 1, *shape[2:]) < 0.8}
    residual, mask = (given[name] if name in inputs else None for name in ("residual", "mask"))
    x = torch.randn(shape, dtype=dtype)
    wanted = step(plain, lambda x: plain(x, residual, mask), x)
    got = step(saved, lambda x: checkpoint(saved, x, residual, mask, use_reentrant=use_reentrant), x)
    assert_close(got, wanted, rtol=0, atol=0)
    assert saved.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # true of the inner one
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_once_under_nested_checkpoints(
    momentum: float | None, outer: bool, inner: bool
) -> None:
    plain = nn.Sequential(small(momentum=momentum), small(momentum=momentum))
    saved = copy.deepcopy(plain)

    def both(x: Tensor) -> Tensor:
        return checkpoint(saved[1], checkpoint(saved[0], x, use_reentrant=inner), use_reentrant=inner)

    x = torch.randn(8, C)
    wanted = step(plain, plain, x)
    got = step(saved, lambda x: checkpoint(both, x, use_reentrant=outer), x)
    assert_close(got, wanted, rtol=0, atol=0)
    assert [part[1].num_batches_tracked.item() for part in saved] == [1, 1]


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_a_checkpoint_in_eval_mode_moves_nothing(options: dict[str, Any]) -> None:
    for use_reentrant in (True, False):
        plain = randomize(small(**options)).eval()
        saved = copy.deepcopy(plain)
        before = buffers(saved)
        x = torch.randn(8, C)
        wanted = step(plain, plain, x)
        got = step(saved, lambda x, s=saved, r=use_reentrant: checkpoint(s, x, use_reentrant=r), x)
        assert_close(got, wanted, rtol=0, atol=0)
        assert_close(buffers(saved), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_a_checkpoint_that_was_never_run_back_has_moved_them(options: dict[str, Any]) -> None:
    model = small(**options)
    for number, use_reentrant in enumerate((True, False), start=1):
        checkpoint(model, torch.randn(8, C, requires_grad=True), use_reentrant=use_reentrant)
        assert model[1].num_batches_tracked == number


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_a_training_forward_without_gradients_moves_them(options: dict[str, Any]) -> None:
    model, twin = small(**options), small(**options)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(8, C)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            model(x)
        twin(x)
    assert model[1].num_batches_tracked == 2
    assert_close(buffers(model), buffers(twin))


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_two_forwards_and_one_backward_move_them_twice(options: dict[str, Any]) -> None:
    model = small(**options)
    twin = small(nn.BatchNorm1d, **options)
    twin.load_state_dict(model.state_dict())
    xs = [torch.randn(8, C) for _ in range(2)]
    for either in (model, twin):
        sum(either(x).square().sum() for x in xs).backward()
    assert model[1].num_batches_tracked == 2
    assert_close(buffers(model), buffers(twin), **CLOSE)
    assert_close(gradients(model), gradients(twin), **CLOSE)


def test_a_forward_after_a_backward_moves_them_again() -> None:
    model = small()
    x = torch.randn(8, C)
    for number in (1, 2):
        step(model, lambda x: checkpoint(model, x, use_reentrant=False), x)
        assert model[1].num_batches_tracked == number
    model(x)
    assert model[1].num_batches_tracked == 3


# ---------------------------------------------------------------------------- torch.compile


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """torch.compile of a whole function by the backend that traces as inductor does and compiles nothing."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_equals_eager(compiled: Callable[..., Any], options: dict[str, Any]) -> None:
    eager = randomize(small(**options))
    traced = copy.deepcopy(eager)
    forward = compiled(traced)
    for training in (True, True, False, True):
        eager.train(training)
        traced.train(training)
        x = torch.randn(8, C)
        assert_close(step(traced, forward, x), step(eager, eager, x), **CLOSE)


def test_compiled_with_residual_and_mask_equals_eager(compiled: Callable[..., Any]) -> None:
    eager = randomize(bn.BatchNorm2d(C, activation="relu", momentum=None))
    traced = copy.deepcopy(eager)
    forward = compiled(traced)
    for _ in range(2):
        x, residual = torch.randn(6, C, 4, 3), torch.randn(6, C, 4, 3)
        mask = torch.rand(6, 1, 4, 3) < 0.8
        got = step(traced, lambda x, r=residual, m=mask: forward(x, r, mask=m), x)
        wanted = step(eager, lambda x, r=residual, m=mask: eager(x, r, mask=m), x)
        assert_close(got, wanted, **CLOSE)


def test_compiled_for_any_batch_size(compiled: Callable[..., Any]) -> None:
    eager = small(ghost_batch_size=4)
    traced = copy.deepcopy(eager)
    forward = compiled(traced)
    for size in (8, 12, 6):
        x = torch.randn(size, C)
        assert_close(step(traced, forward, x), step(eager, eager, x), **CLOSE)


def test_compiled_with_hold_moves_nothing_and_then_moves_again(compiled: Callable[..., Any]) -> None:
    eager, traced = (small(momentum=None) for _ in range(2))
    traced.load_state_dict(eager.state_dict())
    forward = compiled(traced)
    x = torch.randn(8, C)
    forward(x)
    before = buffers(traced)
    with bn.hold(traced):
        y = forward(x)
    assert_close(buffers(traced), before, rtol=0, atol=0)
    assert_close(y, eager(x), **CLOSE)
    forward(x)
    assert traced[1].num_batches_tracked == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_a_checkpoint_inside_a_compiled_function_moves_them_once(
    compiled: Callable[..., Any], options: dict[str, Any], use_reentrant: bool
) -> None:
    eager = small(**options)
    traced = copy.deepcopy(eager)
    # Without fullgraph: torch breaks the graph where a checkpoint writes into buffers.
    forward = torch.compile(lambda x: checkpoint(traced, x, use_reentrant=use_reentrant), backend="aot_eager")
    for number in (1, 2):
        x = torch.randn(8, C)
        assert_close(step(traced, forward, x), step(eager, eager, x), **CLOSE)
        assert traced[1].num_batches_tracked == number


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor_equals_eager() -> None:
    torch._dynamo.reset()
    eager = nn.Sequential(nn.Conv2d(2, C, 3, bias=False), bn.BatchNorm2d(C, momentum=None, activation="relu"))
    traced = copy.deepcopy(eager)
    forward = torch.compile(traced, fullgraph=True)
    for training in (True, True, False):
        eager.train(training)
        traced.train(training)
        x = torch.randn(4, 2, 6, 6)
        assert_close(step(traced, forward, x), step(eager, eager, x), **CLOSE)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_exported_equals_eager(options: dict[str, Any], training: bool) -> None:
    model = randomize(small(**options)).train(training)
    x = torch.randn(8, C)
    exported = torch.export.export(model, (x,)).module()
    assert_close(exported(x), model(x), **CLOSE)
    assert_close({name: t for name, t in exported.named_buffers() if "1." in name}, buffers(model), **CLOSE)


# ---------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("momentum", [0.1, None])
def test_functional_call_writes_into_the_buffers_it_is_given(momentum: float | None) -> None:
    model = randomize(small(momentum=momentum))
    before = state(model)
    twin = copy.deepcopy(model)
    x = torch.randn(8, C)
    given = state(model)
    y = functional_call(model, given, (x,))
    assert_close(y, twin(x))
    assert_close({name: given[name] for name, _ in twin.named_buffers()}, buffers(twin))
    assert_close(state(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_func_grad_with_buffers_passed_in_equals_autograd(options: dict[str, Any]) -> None:
    model = randomize(small(**options))
    twin = copy.deepcopy(model)
    x = torch.randn(8, C)

    def loss(parameters: dict, moving: dict, x: Tensor) -> tuple[Tensor, dict]:
        return functional_call(model, (parameters, moving), (x,)).square().sum(), moving

    parameters, moving = dict(model.named_parameters()), buffers(model)
    got, moved = torch.func.grad(loss, has_aux=True)(parameters, moving, x)
    twin(x).square().sum().backward()
    assert_close({name: grad.detach() for name, grad in got.items()}, gradients(twin), **CLOSE)
    assert_close(moved, buffers(twin), **CLOSE)


TRANSFORMED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "vmap": lambda model, x: torch.func.vmap(model)(x.expand(2, *x.shape)),
    "vmap of grad": lambda model, x: torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(
        x.expand(2, *x.shape)
    ),
}


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_a_transform_with_captured_buffers_says_what_to_do(
    transformed: Callable[[nn.Module, Tensor], Any], options: dict[str, Any]
) -> None:
    model = randomize(small(**options))
    before, x = state(model), torch.randn(8, C)
    with pytest.raises(RuntimeError, match=r"BatchNorm1d '1': .*bn.hold\(model\).*functional_call") as caught:
        transformed(model, x)
    assert caught.value.__cause__ is not None
    assert_close(state(model), before, rtol=0, atol=0)
    with bn.hold(model):
        transformed(model, x)
    assert_close(state(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_torchs_layer_raises_there_too(transformed: Callable[[nn.Module, Tensor], Any]) -> None:
    # So raising is no step back; its message names functorch's operators, and no layer.
    with pytest.raises(RuntimeError, match=r"not supported|were not batched"):
        transformed(small(nn.BatchNorm1d), torch.randn(8, C))


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_an_error_outside_a_transform_is_torchs_own(options: dict[str, Any]) -> None:
    for norm in (nn.BatchNorm1d, bn.BatchNorm1d):
        layer = norm(C, **options)
        with torch.inference_mode():
            layer._buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            layer(torch.randn(8, C))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_vmap_under_hold_is_a_loop(options: dict[str, Any]) -> None:
    model = randomize(small(**options))
    xs = torch.randn(4, 8, C)
    before = state(model)
    with bn.hold(model):
        got = torch.func.vmap(model)(xs)
        assert_close(got, torch.stack([model(x) for x in xs]), **CLOSE)
    assert_close(state(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_ensemble_by_vmap_is_a_loop_over_its_models(options: dict[str, Any], shared_input: bool) -> None:
    models = [small(**options) for _ in range(3)]
    parameters, moving = stack_module_state(models)
    xs = torch.randn(8, C).expand(3, 8, C) if shared_input else torch.randn(3, 8, C)
    meta = copy.deepcopy(models[0]).to("meta")

    def call(parameters: dict, moving: dict, x: Tensor) -> Tensor:
        return functional_call(meta, (parameters, moving), (x,))

    for _ in range(2):
        got = torch.func.vmap(call, in_dims=(0, 0, None if shared_input else 0))(
            parameters, moving, xs[0] if shared_input else xs
        )
        wanted = torch.stack([model(x) for model, x in zip(models, xs, strict=True)])
        assert_close(got, wanted, **CLOSE)
    for name, stacked in moving.items():
        loop = torch.stack([dict(model.named_buffers())[name] for model in models])
        assert_close(stacked, loop, **CLOSE)
    if models[0][1].track_running_stats:
        assert moving["1.num_batches_tracked"].tolist() == [2, 2, 2]


def test_vmap_with_a_mask_for_each_example() -> None:
    layer = randomize(bn.BatchNorm1d(C))
    xs, masks = torch.randn(4, 8, C, 5), torch.rand(4, 8, 1, 5) < 0.7
    with bn.hold(layer):
        got = torch.func.vmap(lambda x, mask: layer(x, mask=mask))(xs, masks)
        assert_close(got, torch.stack([layer(x, mask=mask) for x, mask in zip(xs, masks, strict=True)]))


def test_vmap_in_eval_mode_needs_nothing() -> None:
    model = randomize(small()).eval()
    xs = torch.randn(4, 8, C)
    assert_close(torch.func.vmap(model)(xs), torch.stack([model(x) for x in xs]))


def test_gradients_of_each_example_by_vmap() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(2, C, 3), bn.BatchNorm2d(C), nn.Flatten(), nn.Linear(C * 9, 1)))
    xs = torch.randn(4, 2, 5, 5)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict, x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).square().sum()

    with bn.hold(model):
        got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, xs)
        for number, x in enumerate(xs):
            model.zero_grad()
            model(x[None]).square().sum().backward()
            assert_close({name: grad[number] for name, grad in got.items()}, gradients(model), **CLOSE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_jvp_is_the_product_with_the_jacobian(options: dict[str, Any], training: bool) -> None:
    model = randomize(bn.BatchNorm1d(C, dtype=torch.float64, **options)).train(training)
    x, tangent = (torch.randn(8, C, dtype=torch.float64) for _ in range(2))
    with bn.hold(model):
        y, got = torch.func.jvp(model, (x,), (tangent,))
        jacobian = torch.autograd.functional.jacobian(model, x)
        assert_close(y, model(x))
    assert_close(got, torch.einsum("ncmd,md->nc", jacobian, tangent))


# ---------------------------------------------------------------------------- autograd's other modes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_first_second_and_forward_derivatives(options: dict[str, Any], training: bool) -> None:
    if options.get("renorm"):
        # r and d are constants for the gradient, so differences see more than it; see test_layers.py.
        options = {name: value for name, value in options.items() if name != "renorm"}
    layer = randomize(bn.BatchNorm1d(C, dtype=torch.float64, **options)).train(training)
    x = torch.randn(6, C, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer, x)


@pytest.mark.parametrize("inputs", ["residual", "mask"])
def test_derivatives_with_residual_or_mask(inputs: str) -> None:
    layer = randomize(bn.BatchNorm1d(C, dtype=torch.float64, activation="tanh"))
    x = torch.randn(6, C, dtype=torch.float64, requires_grad=True)
    if inputs == "residual":
        residual = torch.randn(6, C, dtype=torch.float64, requires_grad=True)
        assert gradcheck(layer, (x, residual), check_forward_ad=True)
        assert gradgradcheck(layer, (x, residual))
    else:
        mask = torch.tensor([1.0, 0, 1, 2, 1, 1], dtype=torch.float64)[:, None]
        assert gradcheck(lambda x: layer(x, mask=mask), x, check_forward_ad=True)
        assert gradgradcheck(lambda x: layer(x, mask=mask), x)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"ghost_batch_size": 4}], ids=str)
def test_a_gradient_penalty_equals_torch_nn(options: dict[str, Any]) -> None:
    x = torch.randn(4, C, dtype=torch.float64)  # one ghost batch, which is the whole
    results = []
    for norm in (nn.BatchNorm1d, bn.BatchNorm1d):
        given = options if norm is bn.BatchNorm1d else {}
        model = randomize(small(norm, **given).double())
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(point).square().sum(), point, create_graph=True)
        slope.square().sum().backward()
        results.append((point.grad, gradients(model)))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"renorm": True}], ids=str)
def test_forward_mode_leaves_no_tangent_in_the_buffers(options: dict[str, Any], training: bool) -> None:
    layer = randomize(bn.BatchNorm1d(C, dtype=torch.float64, **options)).train(training)
    x = torch.randn(8, C, dtype=torch.float64)
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(y).tangent is not None
        for buffer in layer.buffers():
            assert forward_ad.unpack_dual(buffer).tangent is None
    assert layer.num_batches_tracked == training


# ---------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_autocast_normalises_bfloat16_by_float32_statistics(options: dict[str, Any], training: bool) -> None:
    if "channel_dim" in options:
        options = {name: value for name, value in options.items() if name != "channel_dim"}
    conv, layer = nn.Conv1d(2, C, 3), randomize(bn.BatchNorm1d(C, **options)).train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(8, 2, 7)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = conv(x)
        y = layer(hidden)
    assert hidden.dtype == y.dtype == torch.bfloat16
    y.sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    # The same numbers, in float32 from the same bfloat16 input: one rounding of the result apart, or two
    # where the activation rounds once more.
    assert_close(y.float(), twin(hidden.detach().float()), rtol=2**-7, atol=2**-7)
    for name, buffer in layer.named_buffers():
        assert_close(buffer, dict(twin.named_buffers())[name], **CLOSE)


def test_autocast_equals_torch_nn() -> None:
    results = []
    for norm in (nn.BatchNorm1d, bn.BatchNorm1d):
        model = randomize(small(norm))
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, model, torch.randn(8, C, generator=torch.Generator().manual_seed(0))))
    assert_close(results[1], results[0], rtol=0, atol=0)
