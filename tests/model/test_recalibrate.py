"""Tests of recalibrate: population statistics over a loader."""

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.model import freeze, recalibrate, unfreeze

C = 3

Norm = nn.modules.batchnorm._BatchNorm


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def biased_1d(features: int, **options: Any) -> bn.BatchNorm1d:
    """Its running variance is the very one that a batch is normalised by."""
    return bn.BatchNorm1d(features, **{"correction": 0, **options})


def biased_2d(features: int) -> bn.BatchNorm2d:
    return bn.BatchNorm2d(features, correction=0)


def small_net(conv_norm: Any = bn.BatchNorm2d, norm: Any = bn.BatchNorm1d) -> nn.Sequential:
    """Three batch norms deep, with dropout that must stay off."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        conv_norm(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 16, 8),
        norm(8),
        nn.Sigmoid(),
        nn.Linear(8, 5),
        norm(5),
    )


def images(samples: int = 60) -> Tensor:
    """Samples whose mean and spread drift, so that no two batches are alike."""
    drift = torch.linspace(0, 3, samples).view(-1, 1, 1, 1)
    return torch.randn(samples, 1, 6, 6) * (1 + drift) + drift


def norms(model: nn.Module) -> list[Norm]:
    return [layer for layer in model.modules() if isinstance(layer, Norm)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def inside(model: nn.Module) -> dict[str, Any]:
    """All that a failed or finished call must leave alone, buffers aside."""
    return {
        name: (
            module.training,
            getattr(module, "momentum", None),
            getattr(module, "track_running_stats", None),
            dict(module._forward_pre_hooks),
            dict(module._forward_pre_hooks_with_kwargs),
            dict(module._forward_hooks),
            [(id(parameter), parameter.requires_grad) for parameter in module.parameters()],
            [id(buffer) for buffer in module.buffers()],
        )
        for name, module in model.named_modules()
    }


def assert_population(model: nn.Sequential, x: Tensor) -> None:
    """Every layer has the statistics of its input when all layers before it normalise by theirs."""
    exact = copy.deepcopy(model).double().eval()
    x = x.double()
    with torch.no_grad():
        for layer, ours in zip(exact, model, strict=True):
            if isinstance(ours, Norm):
                dims = [dim for dim in range(x.ndim) if dim != 1]
                mean, var = x.mean(dims), x.var(dims, correction=getattr(ours, "correction", 1))
                assert_close(ours.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
                assert_close(ours.running_var.double(), var, rtol=1e-6, atol=0)
                layer.running_mean.copy_(mean)
                layer.running_var.copy_(var)
            x = layer(x)


def cut(x: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(x.split(sizes))


sizes_of_60 = st.lists(st.integers(1, 25), min_size=2, max_size=8).map(
    lambda sizes: [size for size in sizes if size] if sum(sizes) == 60 else [*_up_to(sizes, 60)]
)


def _up_to(sizes: list[int], total: int) -> Iterator[int]:
    for size in sizes:
        size = min(size, total)
        if size:
            yield size
        total -= size
    if total:
        yield total


@settings(deadline=None, max_examples=20)
@given(sizes=sizes_of_60)
@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_the_first_layer_is_exact_for_any_cut(kind: str, sizes: list[int]) -> None:
    x = images() + 1000
    layer = (nn.BatchNorm2d if kind == "torch" else bn.BatchNorm2d)(1)
    recalibrate(layer, cut(x, sizes))
    assert_close(layer.running_mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    assert_close(layer.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=15)
@given(sizes=sizes_of_60)
@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_sequential_is_exact_at_any_depth_for_any_cut(kind: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    kinds = (nn.BatchNorm2d, nn.BatchNorm1d) if kind == "torch" else (bn.BatchNorm2d, bn.BatchNorm1d)
    model, x = small_net(*kinds).double(), images().double()
    recalibrate(model, cut(x, sizes), sequential=True)
    assert_population(model, x)


def test_sequential_in_float32() -> None:
    model, x = small_net(), images()
    recalibrate(model, cut(x, [1, 30, 29]), sequential=True)
    exact = copy.deepcopy(model).double()
    recalibrate(exact, [x.double()], sequential=True)
    for ours, wanted in zip(norms(model), norms(exact), strict=True):
        assert_close(ours.running_var.double(), wanted.running_var, rtol=1e-5, atol=0)


def test_one_batch_of_all_is_exact_in_one_pass_too_and_a_cut_shows_in_deeper_layers() -> None:
    model, x = small_net(biased_2d, biased_1d).double(), images().double()
    assert_population(recalibrate(model, [x]), x)
    first, second, _ = (layer.running_mean.clone() for layer in norms(model))
    recalibrate(model, cut(x, [20, 20, 20]))
    assert_close(norms(model)[0].running_mean, first)
    assert not torch.allclose(norms(model)[1].running_mean, second, rtol=1e-2)


def test_one_pass_gives_the_statistics_of_inputs_normalised_by_the_batch() -> None:
    model, x = small_net(nn.BatchNorm2d, nn.BatchNorm1d).double(), images().double()
    batches = cut(x, [13, 20, 27])
    recalibrate(model, batches)
    twin = copy.deepcopy(model).train()
    twin[3].eval()
    inputs: list[Tensor] = []
    twin[6].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with bn.hold(twin):
        for batch in batches:
            twin(batch)
    seen = torch.cat(inputs)
    assert_close(model[6].running_mean, seen.mean(0), rtol=1e-9, atol=1e-12)
    assert_close(model[6].running_var, seen.var(0), rtol=1e-9, atol=0)


def test_statistics_that_were_nan_do_not_matter() -> None:
    model, x = small_net(biased_2d, biased_1d).double(), images().double()
    for layer in norms(model):
        layer.running_mean.fill_(torch.nan)
        layer.running_var.fill_(torch.inf)
    for sequential in (False, True):
        assert_population(recalibrate(model, [x], sequential=sequential), x)


def test_where_update_bn_is_wrong() -> None:
    """Batches of 40 and 24 and a dropout before the batch norm."""
    model = nn.Sequential(nn.Linear(10, 10), nn.Dropout(0.5), nn.BatchNorm1d(10))
    batches = [torch.randn(40, 10) + 10, torch.randn(24, 10) * 5 - 20]
    recalibrate(model, batches)
    with torch.no_grad():
        seen = model[0](torch.cat(batches).double().float()).double()
    assert_close(model[2].running_mean.double(), seen.mean(0), rtol=1e-6, atol=1e-6)
    assert_close(model[2].running_var.double(), seen.var(0), rtol=1e-6, atol=0)
    torch.optim.swa_utils.update_bn(batches, model)
    assert (model[2].running_mean - seen.mean(0)).abs().max() > 1


def test_millions_of_values_far_from_zero() -> None:
    layer = nn.BatchNorm2d(2)
    x = torch.randn(120, 2, 160, 160) + torch.tensor([0.0, 1e4]).view(1, 2, 1, 1)
    recalibrate(layer, [x])
    assert_close(layer.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)
    assert_close(layer.running_mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)


def test_returns_the_model_and_keeps_all_but_the_statistics() -> None:
    model = small_net().train()
    model[1].eval()
    model[6].momentum = None
    calls: list[int] = []
    model[6].register_forward_pre_hook(lambda *_: calls.append(1))
    before, keys = inside(model), list(model.state_dict())
    assert recalibrate(model, [images(8), images(4)]) is model
    assert inside(model) == before
    assert list(model.state_dict()) == keys
    assert calls == [1, 1]


def test_the_counter_is_the_number_of_batches_and_a_cumulative_average_goes_on_from_there() -> None:
    layer = bn.BatchNorm1d(C, momentum=None)
    layer(torch.randn(8, C))
    batches = list(torch.randn(3, 8, C).double().float())
    recalibrate(layer, batches)
    assert layer.num_batches_tracked == 3
    mean = layer.running_mean.clone()
    last = torch.randn(8, C)
    layer(last)
    assert_close(layer.running_mean, (3 * mean + last.mean(0)) / 4)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_a_layer_used_twice_has_both_uses(kind: type[nn.Module]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = kind(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x + 5)

    model, x = Twice(), torch.randn(20, C)
    recalibrate(model, cut(x, [7, 13]))
    seen = torch.cat([x, 3 * x + 5]).double()
    assert_close(model.norm.running_mean.double(), seen.mean(0), rtol=1e-6, atol=1e-6)
    assert_close(model.norm.running_var.double(), seen.var(0), rtol=1e-6, atol=0)
    assert model.norm.num_batches_tracked == 4
    one_pass = state(model)
    recalibrate(model, cut(x, [7, 13]), sequential=True)
    assert_close(state(model), one_pass)


def test_sequential_goes_by_order_of_execution_not_of_registration() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.mix, self.first = bn.BatchNorm1d(C), nn.Linear(C, C), bn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.mix(self.first(x)).sigmoid())

    model, x = Backwards().double(), torch.randn(20, C).double() * 4
    recalibrate(model, cut(x, [3, 17]), sequential=True)
    with torch.no_grad():
        middle = model.mix(model.eval().first(x)).sigmoid()
    assert_close(model.first.running_mean, x.mean(0))
    assert_close(model.last.running_mean, middle.mean(0))
    assert_close(model.last.running_var, middle.var(0))


@pytest.mark.parametrize(
    "options",
    [
        {"ghost_batch_size": 4},
        {"renorm": True},
        {"activation": "relu"},
        {"eps": 0.1},
        {"skip_nonfinite": True},
        {"momentum": None},
        {"affine": False},
    ],
    ids=str,
)
def test_our_options(options: dict[str, Any]) -> None:
    def norm(features: int) -> nn.Module:
        return biased_1d(features, **options)

    model, x = small_net(biased_2d, norm).double(), images().double()
    recalibrate(model, [x])
    assert_population(model, x)
    recalibrate(model, cut(x, [1, 22, 37]), sequential=True)
    assert_population(model, x)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_masks_residuals_and_channels_last(as_keyword: bool) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm1d(C, channel_dim=-1, activation="relu")

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            if as_keyword:
                return self.norm(x=x, residual=x, mask=mask)
            return self.norm(x, x, mask)

    model = Padded()
    x, mask = torch.randn(6, 4, C), torch.rand(6, 4, 1) > 0.3
    mask[0, :2] = True
    padded = x.masked_fill(~mask, torch.nan)
    batches = [{"x": padded[:2], "mask": mask[:2]}, {"x": padded[2:], "mask": mask[2:]}]
    recalibrate(model, batches)
    seen = x[mask.squeeze(-1)].double()
    assert_close(model.norm.running_mean.double(), seen.mean(0), rtol=1e-6, atol=1e-6)
    assert_close(model.norm.running_var.double(), seen.var(0), rtol=1e-6, atol=0)


def test_channel_dim_zero_and_weights() -> None:
    layer = bn.BatchNorm1d(C, channel_dim=0)
    x, weights = torch.randn(C, 50), torch.randint(0, 4, (1, 50))
    recalibrate(layer, [{"x": x, "mask": weights}])
    seen = x.repeat_interleave(weights[0], 1).double()
    assert_close(layer.running_var.double(), seen.var(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_all_of_torchs(kind: type[nn.Module]) -> None:
    shape = {nn.BatchNorm1d: (8, C, 5), nn.BatchNorm3d: (4, C, 2, 2, 2)}.get(kind, (4, C, 3, 3))
    layer, x = kind(C), torch.randn(shape) + 2
    recalibrate(layer, [x])
    assert_close(layer.running_mean, x.transpose(0, 1).flatten(1).mean(1))
    assert_close(layer.running_var, x.transpose(0, 1).flatten(1).var(1))


def test_half_precision() -> None:
    model, x = small_net().bfloat16(), images().bfloat16()
    recalibrate(model, [x])
    seen = model[0](x).double()
    assert_close(model[1].running_var.double(), seen.var((0, 2, 3)), rtol=4e-3, atol=0)


class TestBatches:
    x = torch.randn(12, C)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, x: Tensor, shift: Tensor | float = 0) -> Tensor:
            return self.norm(x + shift)

    @pytest.mark.parametrize(
        "batch",
        [
            x,
            (x, torch.zeros(12)),
            [x, torch.zeros(12)],
            (x,),
            {"x": x},
            {"x": x - 1, "shift": 1},
            ({"x": x - 1, "shift": 1}, torch.zeros(12)),
            ((x - 1, 1), torch.zeros(12)),
        ],
        ids=range(8),
    )
    def test_of_any_structure(self, batch: Any) -> None:
        model = recalibrate(self.Two(), [batch])
        assert_close(model.norm.running_mean, self.x.mean(0))

    def test_a_data_loader(self) -> None:
        dataset = TensorDataset(self.x, torch.zeros(12))
        loader = DataLoader(dataset, batch_size=5, shuffle=True)
        for sequential in (False, True):
            model = recalibrate(self.Two(), loader, sequential=sequential)
            assert_close(model.norm.running_mean, self.x.mean(0))

    def test_forward_gets_the_model_and_the_batch(self) -> None:
        batch = ("label", [self.x])
        model = recalibrate(self.Two(), [batch], forward=lambda model, batch: model(batch[1][0], shift=2))
        assert_close(model.norm.running_mean, self.x.mean(0) + 2)

    def test_a_generator_in_one_pass(self) -> None:
        model = recalibrate(self.Two(), (self.x[i : i + 4] for i in (0, 4, 8)))
        assert_close(model.norm.running_mean, self.x.mean(0))

    def test_are_moved_to_the_device_of_the_first_parameter(self) -> None:
        class Elsewhere(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.norm = nn.Parameter(torch.empty(1, device="meta")), nn.BatchNorm1d(C)

            def forward(self, a: Any, b: Any) -> Tensor:
                given.extend([a[0].device.type, b[0].device.type, b[1]])
                return self.norm(torch.randn(4, C))

        given: list[str] = []
        recalibrate(Elsewhere(), [{"a": [torch.zeros(1)], "b": (torch.zeros(1), "text")}])
        assert given == ["meta", "meta", "text"]

    def test_no_more_than_max_batches_are_taken(self) -> None:
        taken = []

        def batches() -> Iterator[Tensor]:
            for i in (0, 4, 8):
                taken.append(i)
                yield self.x[i : i + 4]

        model = recalibrate(self.Two(), batches(), max_batches=2)
        assert taken == [0, 4]
        assert_close(model.norm.running_mean, self.x[:8].mean(0))

    def test_progress(self, capsys: pytest.CaptureFixture[str]) -> None:
        recalibrate(self.Two(), [self.x, self.x], progress=True)
        assert "recalibrate" in capsys.readouterr().err

    def test_progress_without_tqdm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
        with pytest.raises(ModuleNotFoundError, match="pip install tqdm"):
            recalibrate(self.Two(), [self.x], progress=True)


def test_no_gradients_and_all_else_in_eval_mode() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not x.requires_grad
            assert not torch.is_grad_enabled()
            return x

    model = nn.Sequential(nn.Linear(C, C), Asks(), bn.BatchNorm1d(C), Asks()).train()
    recalibrate(model, [torch.randn(8, C)])
    assert model[1].training


def test_frozen_layers_are_left_alone_and_normalise_by_their_statistics() -> None:
    model, x = small_net(biased_2d, biased_1d).double(), images().double()
    freeze(model[1])
    before = state(model[1])
    recalibrate(model, [x])
    assert_close(state(model[1]), before, rtol=0, atol=0)
    with torch.no_grad():
        seen = model[:6].eval()(x)
    assert_close(model[6].running_mean, seen.mean(0))
    freeze(model)
    with pytest.raises(ValueError, match="every batch norm of the model is frozen"):
        recalibrate(model, [x])
    unfreeze(model)
    assert_population(recalibrate(model, [x]), x)


def test_layers_without_statistics_are_skipped() -> None:
    model = small_net()
    model[1] = bn.BatchNorm2d(4, track_running_stats=False)
    recalibrate(model, [images()])
    assert model[1].running_mean is None
    assert model[6].num_batches_tracked == 1
    with pytest.raises(ValueError, match="has running statistics"):
        recalibrate(model[1], [images()])


@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_that_no_data_reached_keeps_its_statistics_and_is_named(sequential: bool) -> None:
    model = small_net()
    model.add_module("head", nn.Identity())
    model.head.norm = bn.BatchNorm1d(C)
    model.head.norm.running_mean.fill_(7)
    with pytest.warns(UserWarning, match=r"no data reached BatchNorm1d 'head\.norm'"):
        recalibrate(model, [images()], sequential=sequential)
    assert (model.head.norm.running_mean == 7).all()
    assert model[1].num_batches_tracked == 1


def test_a_layer_reached_in_the_first_pass_only_keeps_its_statistics() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.calls = bn.BatchNorm1d(C), bn.BatchNorm1d(C), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.first(x)
            return self.second(x) if self.calls == 1 else x

    model = Fickle()
    x = torch.randn(8, C)
    with pytest.warns(UserWarning, match="no data reached BatchNorm1d 'second'"):
        recalibrate(model, [x], sequential=True)
    assert_close(model.first.running_mean, x.mean(0))
    assert (model.second.running_mean == 0).all()
    assert (model.second.running_var == 1).all()


def test_a_compiled_model() -> None:
    model = small_net(nn.BatchNorm2d, nn.BatchNorm1d).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():  # so that recalibrate could use this compiled code, which knows no hooks
        compiled(images())
    assert recalibrate(compiled, [images()]) is compiled
    assert model[9].num_batches_tracked == 1


def test_data_parallel_is_called_without_its_wrapper() -> None:
    model = nn.DataParallel(small_net())
    assert recalibrate(model, [images()]) is model
    assert model.module[9].num_batches_tracked == 1


class TestFailures:
    """Each names what is wrong and leaves the model as it was."""

    @pytest.fixture
    def model(self) -> nn.Sequential:
        model = small_net()
        model(images())
        model[3].eval()
        return model

    @pytest.fixture(params=[False, True], ids=["one pass", "sequential"])
    def sequential(self, request: pytest.FixtureRequest) -> bool:
        return request.param

    def fails(self, model: nn.Module, loader: Any, error: Any, match: str | None, **options: Any) -> None:
        before, flags = state(model), inside(model)
        with pytest.raises(error, match=match):
            recalibrate(model, loader, **options)
        assert_close(state(model), before, rtol=0, atol=0, equal_nan=True)
        assert inside(model) == flags
        assert torch.is_grad_enabled()

    def test_empty_loader(self, model: nn.Module, sequential: bool) -> None:
        self.fails(model, [], ValueError, "loader is empty", sequential=sequential)

    def test_batches_without_samples(self, model: nn.Module, sequential: bool) -> None:
        self.fails(model, [torch.empty(0, 1, 6, 6)], ValueError, "no data reached any", sequential=sequential)

    def test_a_loader_that_raises(self, model: nn.Module, sequential: bool) -> None:
        class Raises:
            def __iter__(self) -> Iterator[Tensor]:
                yield images()
                raise KeyboardInterrupt

        self.fails(model, Raises(), KeyboardInterrupt, None, sequential=sequential)

    def test_a_loader_that_is_empty_the_second_time(self, model: nn.Module) -> None:
        class Once:
            batches = iter([images()])

            def __iter__(self) -> Iterator[Tensor]:
                return self.batches

        self.fails(model, Once(), ValueError, "loader is empty", sequential=True)

    def test_a_one_shot_iterator_for_sequential(self, model: nn.Module) -> None:
        self.fails(model, iter([images()]), TypeError, "iterated only once", sequential=True)

    @pytest.mark.parametrize("loader", [images(), {"x": images()}, 3, "abc"], ids=lambda x: type(x).__name__)
    def test_no_loader(self, model: nn.Module, loader: Any) -> None:
        self.fails(model, loader, TypeError, "expected an iterable of batches")

    def test_batches_of_a_wrong_shape(self, model: nn.Module, sequential: bool) -> None:
        message = r"Conv2d '0' failed on batch 2 \(list of a float32 tensor of shape \(4, 2, 6, 6\)"
        batches = [[images()], [torch.randn(4, 2, 6, 6)]]
        self.fails(model, batches, RuntimeError, message, sequential=sequential)

    def test_a_wrong_shape_at_a_batch_norm(self, model: nn.Module) -> None:
        self.fails(
            nn.Sequential(nn.Identity(), bn.BatchNorm1d(C)),
            [torch.randn(8, C + 1)],
            ValueError,
            r"BatchNorm1d '1' failed on batch 1.*expected 3 channels",
        )

    @pytest.mark.parametrize(
        "batch",
        [3, None, (), {"y": images()}, [["text"]]],
        ids=["number", "None", "nothing", "keyword", "text"],
    )
    def test_what_the_model_cannot_take(self, model: nn.Module, batch: Any) -> None:
        self.fails(model, [batch], (TypeError, ValueError), "(?s)failed on batch 1.*forward=lambda")

    def test_errors_of_other_classes_are_passed_on(self, model: nn.Module) -> None:
        class OwnError(ValueError):
            pass

        def forward(model: nn.Module, batch: Any) -> None:
            model(batch)
            raise OwnError("own")

        self.fails(model, [images()], OwnError, "^own$", forward=forward)

    def test_one_value_per_channel_under_a_mask(self) -> None:
        model = nn.Sequential(nn.Identity(), bn.BatchNorm1d(C))
        mask = torch.arange(8).view(8, 1) < 1
        self.fails(
            model,
            [torch.randn(8, C)],
            ValueError,
            "BatchNorm1d '1' .*one value per channel",
            forward=lambda model, x: model[1](x, mask=mask),
        )

    def test_one_value_in_all_the_data(self) -> None:
        model = nn.Sequential(nn.Identity(), bn.BatchNorm1d(C))
        self.fails(model, [torch.randn(1, C)], ValueError, r"'1' .*too few values", sequential=True)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_statistics_that_are_not_finite(self, model: nn.Module, value: float, sequential: bool) -> None:
        bad = images()
        bad[3, 0, 2, 2] = value
        message = r"mean of the inputs of BatchNorm2d '1' is not finite"
        self.fails(model, [images(), bad], ValueError, message, sequential=sequential)

    def test_statistics_beyond_the_dtype_of_the_buffers(self) -> None:
        model = nn.Sequential(nn.Identity(), bn.BatchNorm1d(C).half())
        x = torch.randn(64, C).half() * 1000
        self.fails(model, [x], ValueError, r"variance of .*'1' is not finite \(in float16\)")

    @pytest.mark.parametrize("max_batches", [0, -1, 1.5, True])
    def test_max_batches(self, model: nn.Module, max_batches: Any) -> None:
        self.fails(model, [images()], ValueError, "max_batches", max_batches=max_batches)

    def test_no_batch_norm(self) -> None:
        self.fails(nn.Linear(C, C), [torch.randn(8, C)], ValueError, "no batch norm in Linear")

    def test_no_model(self) -> None:
        with pytest.raises(TypeError, match=r"expected a model .* got list"):
            recalibrate([], [])  # type: ignore[arg-type]

    @pytest.mark.parametrize("lazy", [nn.LazyBatchNorm1d, bn.LazyBatchNorm1d, lambda: nn.LazyLinear(C)])
    def test_lazy_layers(self, lazy: Callable[[], nn.Module]) -> None:
        model = nn.Sequential(nn.Sequential(lazy()), bn.BatchNorm1d(C))
        with pytest.raises(ValueError, match=r"'0\.0' has not seen its first input yet: run one batch"):
            recalibrate(model, [torch.randn(8, C)])
        model(torch.randn(8, C))
        recalibrate(model, [torch.randn(8, C)])
