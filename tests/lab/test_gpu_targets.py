"""The table of the GPU's targets, by measurements that are made up; and the script without a GPU."""

import io
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from batchnorm.kernels.cuda.thresholds import Kind
from batchnorm.lab import bench as benchmark
from batchnorm.lab import gpu_targets
from batchnorm.lab.bench_cases import CASES, Case, Shape
from batchnorm.lab.bench_nets import MEMORY_EFFICIENT
from batchnorm.lab.bench_probes import Timing
from batchnorm.lab.bench_results import COMPILED, FLOOR, OURS, TORCH, Result
from batchnorm.lab.data import Dataset
from batchnorm.lab.gpu_targets import Line, Measurements, OnDevice
from batchnorm.lab.peak_memory import Setup
from batchnorm.lab.recipes import Config, configure
from batchnorm.lab.train import EpochResult, load_dataset

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SHAPES: list[Shape] = [(128, 64, 56, 56), (128, 512, 7, 7)]


def results(case: Case, dtype: str, **factors: float) -> list[Result]:
    """Ours takes what a copy takes, others so many times as long."""
    found = []
    for shape in SHAPES:
        times = {OURS: 1.0, FLOOR: 1.0} | factors
        timings = {name: Timing(ms, 0.1, 5) for name, ms in times.items()}
        found.append(Result(case.name, shape, timings, {TORCH: 2, OURS: 1}, (), dtype, "cuda"))
    return found


def history(*results: tuple[float, float]) -> list[EpochResult]:
    return [
        EpochResult(epoch, 0.5, accuracy, seconds) for epoch, (accuracy, seconds) in enumerate(results, 1)
    ]


def good() -> Measurements:
    """All that is promised, and not much more."""
    return Measurements(
        speeds=lambda case, dtype: results(case, dtype, **{TORCH: 1.6, COMPILED: 1.3, "attorch": 2.0}),
        races=lambda kind: {SHAPES[0]: 0.5, SHAPES[1]: 1.01},
        memory=lambda setup: {TORCH: 10 * 2**30, OURS: 10 * 2**30, MEMORY_EFFICIENT: 7 * 2**30},
        history=lambda recipe, batch: {
            ("tutorial", 4): history((0.8, 3.0), (0.83, 0.9), (0.84, 0.9)),
            ("fast", None): history((0.85, 1.0), (0.91, 0.8)),
        }[recipe, batch],
        cache_bytes=lambda: 2**40,
    )


def found(measured: Measurements) -> list[Line]:
    return list(gpu_targets.lines(measured))


def test_every_target_has_its_line_and_is_reached() -> None:
    lines = found(good())
    promised = [line for line in lines if line.reached is not None]
    assert all(line.reached for line in promised), promised
    text = "\n".join(f"{line.what} {line.target} {line.found}" for line in lines)
    for name in ("bfloat16 channels_last", "float32 contiguous"):
        what = f"forward+backward relu, {name}:"
        assert f"{what} torch eager's time / ours >= 1.5 1.60" in text
        assert f"{what} torch.compile's time / ours >= 1.2 1.30" in text
        assert f"{what} attorch's time / ours  2.00" in text
        assert f"{what} share of the copies' bandwidth, each tensor once per pass  100%" in text
        assert f"{what} the same, what the cache cannot hold read twice >= 85% 100%" in text
        assert f"{what} ours / torch eager, worst shape <= 1.02 0.62 on" in text
        for mode in ("training", "inference"):
            what = f"{mode} with relu, {name}, by either clock"
            assert f"{what}: ours / torch eager, worst shape <= 1.02 1.01 on 128x512x7x7" in text
        assert (
            f"peak memory of ResNet-50's training at batch 128, {name}: batchnorm, memory-efficient < 0.75 "
            "7.00 GiB, 0.70 of torch.nn's"
        ) in text
    assert "forward alone, float32 contiguous: ours / torch eager, worst shape" in text
    assert "time of an epoch (median) <= 1.0 s 0.90 s" in text
    assert "after 5 epochs >= 0.8318 - 0.01 0.8400" in text
    assert "accuracy 0.90 within, warm <= 2.0 s of training 1.80 s, after epoch 2" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"speeds": lambda case, dtype: results(case, dtype, **{TORCH: 1.4, COMPILED: 1.3})},
            "torch eager's",
        ),
        (
            {"speeds": lambda case, dtype: results(case, dtype, **{TORCH: 1.6, COMPILED: 1.1})},
            "torch.compile's",
        ),
        ({"speeds": lambda case, dtype: results(case, dtype, **{TORCH: 1.6})}, "torch.compile's"),
        (
            {"speeds": lambda case, dtype: results(case, dtype, **{TORCH: 1.6, COMPILED: 1.3, FLOOR: 0.8})},
            "read twice",
        ),
        ({"races": lambda kind: {SHAPES[0]: 1.03}}, "inference with relu"),
        ({"memory": lambda setup: {TORCH: 100, OURS: 100, MEMORY_EFFICIENT: 75}}, "memory-efficient"),
        ({"history": lambda recipe, batch: history((0.95, 1.1))}, "time of an epoch"),
        ({"history": lambda recipe, batch: history((0.7, 0.1))}, "accuracy by its protocol"),
        ({"history": lambda recipe, batch: history((0.8, 0.9), (0.95, 1.2))}, "fast recipe"),
        ({"history": lambda recipe, batch: history((0.83, 0.9))}, "fast recipe"),
    ],
)
def test_what_is_not_reached_is_said_to(change: dict[str, Callable[..., Any]], words: str) -> None:
    missed = [line.what for line in found(replace(good(), **change)) if line.reached is False]
    assert missed
    assert any(words in what for what in missed)


def test_a_part_that_fails_does_not_cost_the_others() -> None:
    def fail(setup: Setup) -> dict[str, int]:
        raise RuntimeError("CUDA out of memory\nand a long tale")

    parts: list[str] = []
    lines = list(gpu_targets.lines(replace(good(), memory=fail), parts.append))
    failed = [line for line in lines if line.reached is False]
    assert [line.what for line in failed] == [
        "memory of ResNet-50, bfloat16 channels_last",
        "memory of ResNet-50, float32 contiguous",
    ]
    assert all(line.found == "failed: RuntimeError: CUDA out of memory" for line in failed)
    assert len(parts) == 11
    assert lines[-1].reached


def test_what_the_cache_cannot_hold_must_be_read_twice() -> None:
    slow = {TORCH: 1.6, COMPILED: 1.3, OURS: 8 / 5, FLOOR: 1.0}  # eight tensors at the copies' bandwidth
    measured = replace(good(), speeds=lambda case, dtype: results(case, dtype, **slow))

    def shares(cache: int) -> list[tuple[str, bool | None]]:
        lines = found(replace(measured, cache_bytes=lambda: cache))
        return [(line.found, line.reached) for line in lines if "read twice" in line.what]

    assert shares(2**40) == [("62%", False)] * 2
    assert shares(0) == [("100%", True)] * 2
    # Of two bytes a value, the second shape's input (6 MB) and gradient fit; the first's do not.
    cache = 40 * 10**6
    again = 3 - 2 * cache / (2 * math.prod(SHAPES[0]))
    assert shares(cache)[0] == (f"{5 / 8 * ((5 + again) / 5) ** 0.5:.0%}", False)


def test_kinds_of_calls_are_those_of_the_settings() -> None:
    asked: list[Kind] = []

    def races(kind: Kind) -> dict[Shape, float]:
        asked.append(kind)
        return {SHAPES[0]: 0.5}

    found(replace(good(), races=races))
    assert asked == [
        Kind(training, True, rows, half)
        for rows, half in ((True, True), (False, False))
        for training in (True, False)
    ]


def test_the_table_says_what_is_not_reached() -> None:
    lines = [Line("one", ">= 1", "2", True), Line("two", ">= 1", "0", False), Line("three", "", "7")]
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(gpu_targets.table(lines))
    rows = {line.split()[0]: line for line in captured.get().splitlines() if line.strip()}
    assert rows["one"].rstrip().endswith(" reached")
    assert rows["two"].rstrip().endswith("NOT REACHED")
    assert rows["three"].rstrip().endswith("7")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_what_was_expected(tmp_path: Path) -> None:
    output = tmp_path / "gpu.txt"
    command = [sys.executable, str(SCRIPT), "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert run.returncode == 2
    assert run.stdout.startswith("nothing was measured: there is no CUDA GPU here")
    for target in gpu_targets.expected():
        assert target in run.stdout
    assert not output.exists()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the script defines, with a card that is made up."""

    class Card:
        total_memory = 141 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    return runpy.run_path(str(SCRIPT))


def test_the_script_writes_the_table_with_card_and_versions(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class OnDevice:
        def __init__(self, **options: Any) -> None:
            assert options == {"seconds": 0.5, "data_dir": None}

        def measurements(self) -> Measurements:
            return good()

    output = tmp_path / "gpu.txt"
    monkeypatch.setattr(gpu_targets, "OnDevice", OnDevice)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--seconds", "0.5", "--output", str(output)])
    assert script["main"]() == 0
    text = output.read_text()
    assert text.startswith("NVIDIA H200, 141 GiB, driver ")
    assert f"torch {torch.__version__}" in text
    assert "python benchmarks/gpu.py --seconds 0.5" in text
    assert text.count("reached") == sum(line.reached is not None for line in found(good()))


def test_the_script_prints_constants(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from batchnorm.lab import tile_sizes

    monkeypatch.setattr(tile_sizes, "gpu_seconds", lambda *settings: 1.0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiles"])
    assert script["main"]() == 0
    assert "\nTILE = 4096\n" in capsys.readouterr().out


def test_the_script_prints_thresholds(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from batchnorm.lab import crossover

    monkeypatch.setattr(crossover, "gpu_race", lambda device, seconds: lambda kind, shape: 0.5 + kind.rows)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--crossovers"])
    assert script["main"]() == 0
    printed = capsys.readouterr().out
    assert "Kind(training=True, fused=True, rows=True, half=True): None," in printed
    assert "Kind(training=True, fused=True, rows=False, half=True): 1 << 15," in printed


def test_layers_are_timed_beside_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def bench(pairs: Any, seconds: float, **options: Any) -> list[Result]:
        asked.append((list(pairs), seconds, options))
        return []

    monkeypatch.setattr(benchmark, "bench", bench)
    case = CASES["forward+backward relu"]
    device = OnDevice(device="cpu", seconds=0.5, shapes=SHAPES)
    device.measurements().speeds(case, "float32")
    expected = {"compiled": True, "device": "cpu", "dtype": "float32"}
    assert asked == [([(case, shape) for shape in SHAPES], 0.5, expected)]


@pytest.mark.parametrize(("recipe", "batch"), [("tutorial", 4), ("fast", None)])
def test_trainings_are_those_of_the_recipes(
    monkeypatch: pytest.MonkeyPatch, recipe: str, batch: int | None
) -> None:
    digits = load_dataset(configure("digits", train_samples=400, test_samples=50, device="cpu"))
    configs: list[Config] = []

    def load(config: Config, data_dir: str | None) -> Dataset:
        configs.append(config)
        return digits

    monkeypatch.setattr(gpu_targets, "load_dataset", load)
    history = OnDevice(device="cpu", shapes=SHAPES).measurements().history(recipe, batch)
    (config,) = configs
    assert (config.data, config.recipe, config.batch_size) == ("fashion-mnist", recipe, batch or 128)
    assert len(history) == 5
    assert (history[-1].accuracy_eval is not None) == config.tutorial_protocol == (recipe == "tutorial")
