"""Models, weights and data by reference: what is found, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from batchnorm.files import write_new_file
from batchnorm.lab.references import (
    load_weights,
    make_loader,
    make_model,
    weights_as_bytes,
)

MODULE = """
from torch import nn, randn
def make(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
def needs(width): return nn.Linear(width, width)
def number(): return 3
def batches(): return [randn(5, 3) for _ in range(2)]
table = {}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "their_nets.py").write_text(MODULE)
    return tmp_path


def test_a_model_and_a_loader_of_the_folder_one_is_in() -> None:
    assert isinstance(make_model("their_nets:make")[1], nn.BatchNorm1d)  # type: ignore[index]
    assert len(list(make_loader("their_nets:batches"))) == 2


def test_a_built_in_data_set() -> None:
    images, labels = next(iter(make_loader("digits", batch_size=7)))
    assert images.shape == (7, 1, 28, 28)
    assert labels.shape == (7,)
    standardized = torch.cat([images for images, _ in make_loader("digits", standardize=True)])
    assert abs(standardized.mean().item()) < 1e-3


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("their_nets", "package.module:function"),
        ("their_nets:make()", "package.module:function"),
        ("__import__('os'):system", "package.module:function"),
        ("their_nets.make", "package.module:function"),
        ("no_such_module:make", "cannot be imported"),
        ("their_nets:nothing", "has no nothing"),
        ("their_nets:table", "expected a function"),
        ("their_nets:needs", "without arguments"),
        ("their_nets:number", "expected a torch.nn.Module"),
    ],
)
def test_a_wrong_model(reference: str, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make_model(reference)


@pytest.mark.parametrize(
    ("reference", "words"),
    [("imagenet", "expected one of digits"), ("their_nets:number", "expected batches")],
)
def test_wrong_data(reference: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_loader(reference)
    with pytest.raises(ValueError, match="batch size 0"):
        make_loader("digits", batch_size=0)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_weights_there_and_back(here: Path, name: str) -> None:
    written, read = make_model("their_nets:make"), make_model("their_nets:make")
    write_new_file(here / name, weights_as_bytes(written, Path(name).suffix))
    load_weights(read, here / name)
    for wanted, got in zip(written.state_dict().values(), read.state_dict().values(), strict=True):
        assert torch.equal(wanted, got)


def test_tied_weights_in_safetensors(here: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    write_new_file(here / "w.safetensors", weights_as_bytes(model, ".safetensors"))
    assert set(safetensors.torch.load_file(here / "w.safetensors")) == set(model.state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_weights_among_other_things(here: Path, key: str) -> None:
    model = make_model("their_nets:make")
    torch.save({"epoch": 3, key: model.state_dict()}, here / "checkpoint.pt")
    other = make_model("their_nets:make")
    load_weights(other, here / "checkpoint.pt")
    assert torch.equal(other.state_dict()["0.weight"], model.state_dict()["0.weight"])


@pytest.mark.parametrize(
    ("rename", "others", "said"),
    [
        (lambda n: f"module.{n}", {}, "took module. off the names of the weights"),
        (lambda n: f"model.{n}", {}, "took model. off the names of the weights"),
        (lambda n: f"_orig_mod.{n}", {}, "took _orig_mod. off the names of the weights"),
        (lambda n: f"module._orig_mod.{n}", {}, "took _orig_mod. and module. off the names of the weights"),
        (lambda n: f"model.module.{n}", {}, "took model.module. off the names of the weights"),
        (lambda n: f"{n[:2]}_orig_mod.{n[2:]}", {}, "took _orig_mod. off the names of the weights"),
        (lambda n: f"encoder.net.{n}", {}, "took encoder.net. off the names of the weights"),
        (
            lambda n: f"module.{n}",
            {"n_averaged": torch.tensor(3)},
            "took module. off the names of the weights, and left out n_averaged, which are none of them",
        ),
        (
            lambda n: f"model.{n}",
            {f"teacher.{n}": torch.ones(1) for n in ("0.weight", "0.bias")},
            "took model. off the names of the weights, and left out teacher.0.bias, teacher.0.weight, "
            "which are none of them",
        ),
        (lambda n: n, {}, ""),
    ],
)
def test_names_with_a_prefix(here: Path, rename: Any, others: dict[str, Any], said: str) -> None:
    model, other = make_model("their_nets:make"), make_model("their_nets:make")
    state = {rename(name): tensor for name, tensor in model.state_dict().items()}
    torch.save(state | others, here / "w.pt")
    assert load_weights(other, here / "w.pt") == said
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_two_prefixes_and_none_that_fits(here: Path) -> None:
    model = make_model("their_nets:make")
    state = model.state_dict()
    twice = {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in state.items()}
    torch.save(twice, here / "w.pt")
    with pytest.raises(ValueError, match=r"more than once, under student\., teacher\.: keep one"):
        load_weights(model, here / "w.pt")
    # The usual one is meant where there is one.
    torch.save({name.replace("student", "module"): t for name, t in twice.items()}, here / "w.pt")
    assert load_weights(model, here / "w.pt").startswith("took module. off")
    torch.save({f"module.{name}": t for name, t in state.items() if name != "0.bias"}, here / "w.pt")
    with pytest.raises(ValueError, match=r"lacks 0\.bias, 0\.weight"):
        load_weights(model, here / "w.pt")


class Bomb:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("exploded"),)


def test_a_file_that_would_run_code(here: Path) -> None:
    (here / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": Bomb()}, here / "bomb2.pt")
    for name in ("bomb.pt", "bomb2.pt"):
        with pytest.raises(ValueError, match="no checkpoint of tensors alone"):
            load_weights(make_model("their_nets:make"), here / name)
    assert not (here / "exploded").exists()


def test_wrong_weights(here: Path) -> None:
    model = make_model("their_nets:make")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refused(state: object, words: str) -> None:
        torch.save(state, here / "w.pt")
        with pytest.raises(ValueError, match=words):
            load_weights(model, here / "w.pt")
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    refused([1, 2], "holds no state_dict")
    refused({"a": 1}, "holds no state_dict")
    refused({}, "lacks 0.bias, 0.weight, 1.bias and 4 more, which the model has")
    refused({**before, "extra": torch.ones(1)}, "has extra, which the model lacks")
    refused({**before, "0.weight": torch.ones(2, 2)}, r"0.weight has shape \(2, 2\), in the model \(4, 3\)")
    (here / "w.safetensors").write_bytes(b"not really")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_weights(model, here / "w.safetensors")
    with pytest.raises(ValueError, match="there is no file"):
        load_weights(model, here / "nowhere.pt")
