"""Other tools on our layers: the right result, or an error that says what to do; nothing lost in silence."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim import swa_utils
from torch.testing import assert_close

import batchnorm as bn
from benchmarks.zoo.libraries import torchvision_operators

torchvision_operators.define()

C = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "activation": {"activation": "relu"},
    "ghost": {"ghost_batch_size": 2},
    "renorm": {"renorm": True},
    "channel_dim": {"channel_dim": 3},
    "correction": {"correction": 0},
    "skip_nonfinite": {"skip_nonfinite": True},
}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():  # of others
        warnings.simplefilter("ignore")
        yield


def net(norm: nn.Module | None = None, **options: Any) -> nn.Sequential:
    norm = norm or bn.BatchNorm2d(C, **options)
    last = (nn.Conv2d(C, C, 1), nn.Flatten(), nn.Linear(16 * C, 2))
    return nn.Sequential(nn.Conv2d(3, C, 3), norm, nn.ReLU(), *last)


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 6, 6)


def started(model: nn.Module) -> nn.Module:
    model(images())
    return model


# torch.fx


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), bn.BatchNorm2d(3, activation="silu")
        self.last = bn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x), residual=x))


def test_fx_takes_our_layers_as_leaves() -> None:
    model = Named()
    traced = torch.fx.symbolic_trace(model)
    calls = [(node.op, node.target) for node in traced.graph.nodes][1:-1]
    assert calls == [("call_module", "conv"), ("call_module", "norm"), ("call_module", "last")]
    twin, x = copy.deepcopy(model), images()
    for one in (model, twin):
        one.train()
    assert_close(traced(x), twin(x))
    assert_close(model.state_dict(), twin.state_dict())


def test_fx_takes_converted_layers_as_leaves() -> None:
    model = started(net(nn.BatchNorm2d(C)))
    twin = copy.deepcopy(model)
    traced, x = torch.fx.symbolic_trace(bn.convert(model)), images()
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *["call_module"] * 6, "output"]
    assert_close(traced(x), twin(x))
    assert_close(traced.eval()(x), twin.eval()(x))


def test_torchvisions_feature_extractor() -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(num_classes=3).eval()
    x, nodes = torch.randn(2, 3, 64, 64), ["layer1", "layer2.0.bn1"]
    wanted = extraction.create_feature_extractor(copy.deepcopy(model), nodes)(x)
    for convert in (bn.convert, lambda m: bn.convert(m, fuse=False)):
        got = extraction.create_feature_extractor(convert(copy.deepcopy(model)), nodes)(x)
        assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert all(type(value) is Tensor for value in got.values())


def test_fx_fusion_leaves_our_layers() -> None:
    optimization = pytest.importorskip("torch.fx.experimental.optimization")
    model, x = started(net(activation="relu")).eval(), images()
    assert_close(optimization.fuse(model)(x), model(x))


def test_scripting_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile .*torch\.export"):
        torch.jit.script(started(net()))
    model = bn.revert(bn.convert(started(net(nn.BatchNorm2d(C)))))
    assert_close(torch.jit.script(model).eval()(x := images()), model.eval()(x))


# Synchronisation


@pytest.mark.parametrize("option", OPTIONS)
def test_convert_sync_batchnorm_loses_nothing_in_silence(option: str) -> None:
    model = net(**OPTIONS[option])
    before = [dict(vars(module)) for module in model.modules()]
    name = next(iter(OPTIONS[option]))
    with pytest.raises(RuntimeError, match=rf"would lose {name}=.*bn\.convert\(model, sync=True\)"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("make", [lambda: net(), lambda: bn.convert(net(nn.BatchNorm2d(C)))])
def test_convert_sync_batchnorm_of_plain_layers(make: Callable[[], nn.Module]) -> None:
    model = make()
    weight = model[1].weight
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synchronised[1]) is nn.SyncBatchNorm
    assert synchronised[1].weight is weight


def test_lightnings_sync_batchnorm() -> None:
    plugins = pytest.importorskip("lightning.pytorch.plugins")
    with pytest.raises(RuntimeError, match="would lose activation='relu'"):
        plugins.TorchSyncBatchNorm().apply(net(activation="relu"))
    assert type(plugins.TorchSyncBatchNorm().apply(net())[1]) is nn.SyncBatchNorm


def test_timms_sync_batchnorm_and_freezing() -> None:
    norm_act = pytest.importorskip("timm.layers.norm_act")
    utils = pytest.importorskip("timm.utils")
    with pytest.raises(RuntimeError, match="convert_sync_batchnorm would lose activation='relu'"):
        norm_act.convert_sync_batchnorm(net(activation="relu"))
    for freeze in (norm_act.freeze_batch_norm_2d, utils.freeze):
        with pytest.raises(RuntimeError, match=r"freeze_batch_norm_2d would lose .*bn\.freeze\(model\)"):
            freeze(net(activation="relu"))
    # Its own layers keep what they carry, converted or not.
    converted = bn.convert(started(net(norm_act.BatchNormAct2d(C, act_layer=nn.SiLU)))).eval()
    wanted, x = copy.deepcopy(converted), images()
    assert_close(norm_act.freeze_batch_norm_2d(copy.deepcopy(converted))(x), wanted(x))
    synchronised = norm_act.convert_sync_batchnorm(copy.deepcopy(converted))
    assert type(synchronised[1]) is norm_act.SyncBatchNormAct
    assert isinstance(synchronised[1].act, nn.SiLU)
    with pytest.raises(RuntimeError, match="would lose activation='silu'"):
        nn.SyncBatchNorm.convert_sync_batchnorm(converted)


# Fusion and quantisation


def test_fuse_conv_bn_eval() -> None:
    model, x = started(net()).eval(), images()
    assert_close(fuse_conv_bn_eval(model[0], model[1])(x), model[:2](x))
    fused = bn.convert(started(net(nn.BatchNorm2d(C)))).eval()
    assert_close(fuse_conv_bn_eval(fused[0], fused[1])(x), fused[1](fused[0](x)))
    with pytest.raises(RuntimeError, match=r"fuse_conv_bn_eval would lose activation='relu'.*bn\.fold"):
        fuse_conv_bn_eval(nn.Conv2d(3, C, 3).eval(), bn.BatchNorm2d(C, activation="relu").eval())
    with pytest.raises(RuntimeError, match="fuse_linear_bn_eval would lose activation='gelu'"):
        fuse_linear_bn_eval(nn.Linear(3, C).eval(), bn.BatchNorm1d(C, activation="gelu").eval())
    # What matters in training alone is not lost.
    layer = bn.BatchNorm2d(C, ghost_batch_size=2, correction=0).eval()
    assert_close(fuse_conv_bn_eval(model[0], layer)(x), layer(model[0](x)))


def test_ultralytics_fusion() -> None:
    utils = pytest.importorskip("ultralytics.utils.torch_utils")
    conv = nn.Conv2d(3, C, 3, bias=False)
    with pytest.raises(RuntimeError, match="fuse_conv_and_bn would lose activation='relu'"):
        utils.fuse_conv_and_bn(conv, bn.BatchNorm2d(C, activation="relu"))
    layer, x = bn.BatchNorm2d(C).eval(), images()
    assert_close(utils.fuse_conv_and_bn(conv, layer)(x), layer(conv(x)))


def test_eager_quantisation_refuses_to_fuse_and_quantises_around() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = started(net(activation="relu"))
    with pytest.raises(AssertionError, match=r"did not find fuser method for.*batchnorm"):
        quantization.fuse_modules(copy.deepcopy(model).eval(), [["0", "1"]])
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    prepared = quantization.prepare_qat(model.train())
    assert prepared[1].activation == "relu"
    prepared(images()).sum().backward()


def test_fx_quantisation_keeps_the_layer() -> None:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    quantization = pytest.importorskip("torch.ao.quantization")
    model, x = started(net(activation="silu")).eval(), images(40)
    mapping = quantization.get_default_qconfig_mapping("x86")
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,))
    prepared(x)
    quantised = quantize_fx.convert_fx(prepared)
    assert_close(quantised(x), model(x), rtol=0.2, atol=0.2)


def test_torchao_quantises_the_rest() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32), bn.BatchNorm1d(32, activation="relu"), nn.Linear(32, 32))
    model(x := torch.randn(8, 32))
    wanted = model.eval()(x)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert_close(model(x), wanted, rtol=0.1, atol=0.1)


# Statistics


def test_update_bn_of_ours_is_that_of_torchs() -> None:
    ours, theirs = started(net()), started(net(nn.BatchNorm2d(C)))
    theirs.load_state_dict(ours.state_dict())
    batches = [images(5) * 3 + 1 for _ in range(3)]
    for model in (ours, theirs):
        swa_utils.update_bn(batches, model)
    assert_close(ours.state_dict(), theirs.state_dict())
    assert (ours[1].momentum, ours[1].training) == (0.1, True)


def test_update_bn_leaves_frozen_statistics() -> None:
    model = started(started(net(nn.BatchNorm2d(C))))
    bn.freeze(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    swa_utils.update_bn([images(5) * 3], model)
    assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    bn.unfreeze(model)
    swa_utils.update_bn([images(5) * 3], model)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_fvcores_update_bn_stats() -> None:
    precise = pytest.importorskip("fvcore.nn.precise_bn")
    ours, theirs = started(net()), started(net(nn.BatchNorm2d(C)))
    theirs.load_state_dict(ours.state_dict())
    batches = [images(5) * 3 + 1 for _ in range(3)]
    for model in (ours, theirs):
        precise.update_bn_stats(model, batches, num_iters=3)
    assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models(use_buffers: bool) -> None:
    model = bn.convert(started(net(nn.BatchNorm2d(C))))
    average = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
    )
    model(images()).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update_parameters(model)
    bn.recalibrate(average, [images() for _ in range(2)])
    assert type(average(images())) is Tensor
    assert isinstance(average.module[1], bn.BatchNorm2d)


def test_timms_ema() -> None:
    utils = pytest.importorskip("timm.utils")
    model = bn.convert(started(net(nn.BatchNorm2d(C))))
    average = utils.ModelEmaV3(model, decay=0.5)
    before = model[1].running_mean.clone()
    model(images() + 1)
    average.update(model)
    assert not torch.equal(average.module[1].running_mean, before)


# Weights


def test_pruned_layers() -> None:
    x, found = images(), []
    for convert in (lambda m: m, bn.convert, lambda m: bn.revert(bn.convert(m))):
        torch.manual_seed(1)
        model = started(net(nn.BatchNorm2d(C)))
        nn.init.uniform_(model[1].weight)
        prune.l1_unstructured(model[1], "weight", amount=2)
        convert(model)
        found.append((model(x), model[1].weight))
        prune.remove(model[1], "weight")
        found.append((model(x), model[1].weight))
    assert int((found[0][1] == 0).sum()) == 2
    assert_close(found, [found[0]] * 6)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_reparametrised_layers(norm: str) -> None:
    x, found = images(), []
    for convert in (lambda m: m, bn.convert, lambda m: bn.revert(bn.convert(m))):
        torch.manual_seed(1)
        model = started(net(nn.BatchNorm2d(C)))
        getattr(nn.utils.parametrizations, norm)(model[3])
        getattr(nn.utils, norm)(model[0])
        found.append(convert(model)(x))
    assert_close(found, [found[0]] * 3)


def test_lora_around_our_layers() -> None:
    peft = pytest.importorskip("peft")
    model = bn.convert(started(net(nn.BatchNorm2d(C))))
    wanted, x = copy.deepcopy(model).eval(), images()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "3"], modules_to_save=["1"]))
    assert_close(adapted.eval()(x), wanted(x))
    adapted.train()(x).sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert any("modules_to_save" in name and name.endswith("weight") for name in trained)
    assert_close(adapted.merge_and_unload().eval()(x).shape, wanted(x).shape)


def test_accelerate_trains_a_converted_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = bn.convert(started(net(nn.BatchNorm2d(C))))
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model[1].weight.detach().clone()
    accelerator.backward(model(images()).square().sum())
    optimizer.step()
    assert isinstance(accelerator.unwrap_model(model)[1], bn.BatchNorm2d)
    assert not torch.equal(before, model[1].weight)


def test_lightning_trains_a_converted_model() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = bn.convert(started(net(nn.BatchNorm2d(C))))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(images(12), batch_size=6))  # type: ignore[arg-type]
    assert int(module.model[1].num_batches_tracked) == 3
