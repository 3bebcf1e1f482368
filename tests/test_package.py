"""Tests of the package as a whole: its public names, what importing it costs, what it ships."""

import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

import batchnorm as bn

PUBLIC = {
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Finding",
    "FoldReport",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Renorm",
    "Report",
    "absorb_bias",
    "batch_norm",
    "convert",
    "diagnose",
    "fold",
    "freeze",
    "hold",
    "load_keras",
    "memory_efficient",
    "merge_running_statistics",
    "parameter_groups",
    "recalibrate",
    "reset",
    "revert",
    "unfreeze",
}
# Found in the environment of a test run; a plain import must not pay for them, nor need the [lab] ones.
HEAVY = {
    "llvmlite",
    "numba",
    "triton",
    "matplotlib",
    "sklearn",
    "typer",
    "rich",
    "pooch",
    "jinja2",
    "tqdm",
    "psutil",
    "batchnorm.lab",
    "batchnorm.doctor",
}
ABSENT = HEAVY - {"batchnorm.lab", "batchnorm.doctor"}


def in_a_new_process(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_public_names_are_there_and_listed() -> None:
    assert set(bn.__all__) >= PUBLIC
    assert list(bn.__all__) == sorted(set(bn.__all__))
    for name in bn.__all__:
        assert getattr(bn, name) is not None


def test_the_names_that_are_imported_later_are_listed_before() -> None:
    out = in_a_new_process(
        "import batchnorm as bn; print(set(bn.__all__) <= set(dir(bn)), 'diagnose' in vars(bn));"
        "print(bn.diagnose.__module__, 'diagnose' in vars(bn))"
    )
    assert out.splitlines() == ["True False", "batchnorm.doctor.diagnose True"]
    with pytest.raises(AttributeError, match="has no attribute 'diagnosis'"):
        bn.diagnosis  # type: ignore[attr-defined]  # noqa: B018


def test_a_star_import_brings_exactly_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from batchnorm import *", names)
    assert set(names) - {"__builtins__"} == set(bn.__all__)


def test_every_public_name_says_what_it_is() -> None:
    for name in bn.__all__:
        doc = inspect.getdoc(getattr(bn, name))
        assert doc, name
        # Not the docstring of torch.nn's class, inherited because ours has none.
        assert doc != inspect.getdoc(getattr(nn, name, None)), name


def test_modules_that_define_public_things_belong_to_the_package() -> None:
    for name in bn.__all__:
        assert getattr(bn, name).__module__.startswith("batchnorm."), name


def test_importing_it_imports_nothing_heavy() -> None:
    # A module that torch imports by itself is torch's cost.
    loaded = in_a_new_process(
        "import sys, torch; before = set(sys.modules); import batchnorm;"
        "print(*sorted(set(sys.modules) - before))"
    ).split()
    assert "batchnorm.layers" in loaded
    assert not [name for name in loaded for heavy in HEAVY if name == heavy or name.startswith(f"{heavy}.")]


def test_it_works_where_none_of_them_is_installed_and_changes_nothing_global() -> None:
    out = in_a_new_process(
        f"import sys; sys.modules.update(dict.fromkeys({sorted(ABSENT)}))\n"
        "import torch; torch.manual_seed(3); state = torch.get_rng_state(), torch.get_num_threads()\n"
        "import batchnorm as bn\n"
        "print(torch.equal(torch.get_rng_state(), state[0]), torch.get_num_threads() == state[1])\n"
        "print(bn.BatchNorm1d(3)(torch.randn(4, 3)).shape)"
    )
    assert out.splitlines() == ["True True", "torch.Size([4, 3])"]


def test_it_ships_its_types() -> None:
    assert importlib.resources.files("batchnorm").joinpath("py.typed").is_file()


def test_the_version_is_that_of_the_installed_distribution() -> None:
    assert bn.__version__ == importlib.metadata.version("batchnorm")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("lazy", ["", "Lazy"])
def test_a_layer_takes_every_argument_of_torch_nns(rank: int, lazy: str) -> None:
    theirs = getattr(nn, f"{lazy}BatchNorm{rank}d")
    ours = getattr(bn, f"{lazy}BatchNorm{rank}d")
    given = {"num_features": 3, "eps": 1e-3, "momentum": 0.2, "affine": True, "track_running_stats": True}
    given |= {"device": "cpu", "dtype": torch.float64, "bias": True}
    arguments = {name: given[name] for name in inspect.signature(theirs).parameters}
    assert repr(ours(**arguments)) == repr(theirs(**arguments))
