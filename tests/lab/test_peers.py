"""Peers: other libraries' layers beside ours, with stand-ins for the libraries."""

import io
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from batchnorm.lab import bench, tables
from batchnorm.lab.bench_cases import CASES
from batchnorm.lab.bench_results import FLOOR, OURS, TORCH, Result
from batchnorm.lab.peers import PEERS

NO_TIME = 1e-9
SHAPE = (2, 4, 5, 5)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a module with these attributes where imports find it, and its packages."""

    def put(path: str, **attributes: Any) -> None:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__path__ = []  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)
        vars(module).update(attributes)

    return put  # type: ignore[return-value]


class Attorch(nn.BatchNorm2d):
    def __init__(self, features: int, act_func: str | None = None) -> None:
        super().__init__(features)
        self.act_func = act_func

    def forward(self, x: Tensor, pre_act_add: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        y = y if pre_act_add is None else y + pre_act_add
        return y if self.act_func is None else torch.relu(y)


class ApexGroup(nn.BatchNorm2d):
    def __init__(self, features: int, fuse_relu: bool = False) -> None:
        super().__init__(features)
        self.fuse_relu = fuse_relu

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert x.is_contiguous()
        assert x.shape == (2, 5, 5, 4)
        y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = y if z is None else y + z
        return torch.relu(y) if self.fuse_relu else y


class ApexSync(nn.BatchNorm2d):
    def __init__(self, features: int, channel_last: bool = False) -> None:
        super().__init__(features)
        self.last = channel_last

    def forward(self, x: Tensor) -> Tensor:
        if not self.last:
            return super().forward(x)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class InPlace(nn.BatchNorm2d):
    def __init__(self, features: int, activation: str) -> None:
        super().__init__(features)
        assert activation == "identity"

    def forward(self, x: Tensor) -> Tensor:
        return x.copy_(super().forward(x.clone()))


def measured(case: str, dtype: str = "float32") -> Result:
    return bench.measure(CASES[case], SHAPE, NO_TIME, dtype=dtype, peers=PEERS)


def test_what_is_not_installed_is_not_listed() -> None:
    result = measured("forward+backward relu")
    assert set(result.timings) == {TORCH, OURS, FLOOR}
    assert result.notes == ()


def test_a_package_of_the_same_name_is_not_a_peer(install: Callable[..., None]) -> None:
    install("apex")
    assert measured("forward+backward channels_last", "float16").notes == ()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_installed_ones_are_timed_where_they_fit(install: Callable[..., None], case: str, dtype: str) -> None:
    install("attorch", BatchNorm2d=Attorch)
    install("apex.contrib.groupbn", BatchNorm2d_NHWC=ApexGroup)
    sys.modules["apex.parallel"] = sys.modules["apex.contrib"]
    sys.modules["apex.parallel"].SyncBatchNorm = ApexSync  # type: ignore[attr-defined]
    install("inplace_abn", InPlaceABN=InPlace)
    try:
        result = measured(case, dtype)
    finally:
        del sys.modules["apex.parallel"]
    expected = {TORCH, OURS, FLOOR, "attorch"}
    if "channels_last" in case and dtype == "float16":
        expected.add("apex groupbn")
    if "residual" not in case:
        expected.add("apex sync")
    if "relu" not in case:
        expected.add("inplace_abn, of a copy")
    assert result.notes == ()
    assert set(result.timings) == expected


def test_one_that_fails_is_said_to_and_the_others_are_timed(install: Callable[..., None]) -> None:
    class Fails(nn.Module):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("no kernel image\nand a long tale")

    install("attorch", BatchNorm2d=Fails)
    install("inplace_abn")  # without the layer
    result = measured("forward+backward")
    assert set(result.timings) == {TORCH, OURS, FLOOR}
    assert result.notes == (
        "attorch failed: RuntimeError: no kernel image",
        "inplace_abn, of a copy failed: AttributeError: module 'inplace_abn' has no attribute 'InPlaceABN'",
    )


def test_one_that_computes_something_else_is_not_timed(install: Callable[..., None]) -> None:
    class Wrong(Attorch):
        def forward(self, x: Tensor, pre_act_add: Tensor | None = None) -> Tensor:
            return 1.01 * super().forward(x, pre_act_add)

    install("attorch", BatchNorm2d=Wrong)
    result = measured("forward+backward relu")
    assert "attorch" not in result.timings
    assert result.notes[0].startswith("attorch failed: ArithmeticError: its output differs from torch.nn's")


def test_the_table_has_a_column_for_each(install: Callable[..., None]) -> None:
    install("attorch", BatchNorm2d=Attorch)
    results = [measured("forward+backward relu"), bench.measure(CASES["forward"], SHAPE, NO_TIME)]
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(*tables.bench(results, None), sep="\n")
    with_it, without = captured.get().split("forward\n", 1)[0], captured.get()
    assert with_it.count("attorch") == 1
    assert without.count("attorch") == 1
