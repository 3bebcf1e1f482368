"""Benchmark: what is chosen, what is timed and counted, and the sums done with it."""

import gc
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import batchnorm
from batchnorm.lab import bench, bench_cases, bench_results, figures, tables
from batchnorm.lab.bench_cases import CASES, DTYPES, GPU_SHAPES, SHAPES, Case
from batchnorm.lab.bench_nets import MEMORY_EFFICIENT, NO_NORM, TAILS, ResNet18, measure_nets
from batchnorm.lab.bench_probes import LEAST_ROUNDS, Contender, Timing, gc_paused, held_bytes, take_turns
from batchnorm.lab.bench_results import COMPILED, FLOOR, OURS, TORCH, TORCH_OTHER_LAYOUT, Result, Summary

NO_TIME = 1e-9  # the least number of rounds
SMALL = [(4, 6), (3, 4, 5), (2, 3, 4, 5), (2, 3, 2, 4, 5)]


def made_up(case: str, shape: tuple[int, ...], **ms: float) -> Result:
    """Of milliseconds torch, ours and floor."""
    names = {"torch": TORCH, "ours": OURS, "floor": FLOOR, "compiled": COMPILED}
    timings = {names[name]: Timing(value, value / 10, 7) for name, value in ms.items()}
    return Result(case, shape, timings, {TORCH: 200, OURS: 50})


def test_default_shapes_are_those_of_the_nets_each_once() -> None:
    shapes = bench_cases.parse_shapes(",".join(SHAPES))
    assert len(shapes) == len(set(shapes)) == 24 + 16 + 2 + 1 + 1
    assert {(32, 256, 56, 56), (8, 2048, 7, 7), (1024, 84), (32, 64, 1000), (16, 16, 8, 8)} <= set(shapes)


def test_groups_and_shapes_by_hand() -> None:
    assert bench_cases.parse_shapes(" 2x3x4x5, tiny,16x16x8x8 ,7x9") == [(2, 3, 4, 5), (16, 16, 8, 8), (7, 9)]
    assert bench_cases.shape_name((2, 3, 4, 5)) == "2x3x4x5"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "--shapes is empty"),
        (" ,", "--shapes is empty"),
        ("vgg", "unknown shape 'vgg': expected one of resnet50, lenet, mlp, 1d, 3d, tiny, or 2 to 5 sizes"),
        ("4", "unknown shape '4'"),
        ("1x2x3x4x5x6", "unknown shape"),
        ("4x-3", "unknown shape"),
        ("4x²", "unknown shape"),
        ("4x" + "9" * 400, "unknown shape"),
        ("0x3", "no more than one value per channel"),
        ("1x3x1x1", "no more than one value per channel"),
        ("999999x999999x99", "GiB are free: choose smaller ones"),
    ],
)
def test_bad_shapes(given: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bench_cases.parse_shapes(given)


def test_cases_by_name_and_the_shapes_they_fit() -> None:
    cases = bench_cases.parse_cases("forward, forward+backward channels_last,forward")
    assert [case.name for case in cases] == ["forward", "forward+backward channels_last"]
    fitting = [(case.name, shape) for case, shape in bench_cases.pairs(cases, SMALL)]
    assert fitting == [("forward", shape) for shape in SMALL] + [
        ("forward+backward channels_last", shape) for shape in SMALL[2:]
    ]
    with pytest.raises(ValueError, match="unknown case 'backward': expected one of forward, forward"):
        bench_cases.parse_cases("backward")
    with pytest.raises(ValueError, match="channels_last needs a 4D or 5D shape"):
        bench_cases.pairs(cases[1:], SMALL[:2])


@pytest.mark.parametrize("shape", SMALL, ids=bench_cases.shape_name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_sides_compute_the_same(case: Case, shape: tuple[int, ...]) -> None:
    if not case.fits(shape):
        return
    inputs, gradient = bench.data(case, shape)
    assert len(inputs) == 1 + case.residual
    assert (gradient is not None) == case.backward
    for tensor in [*inputs, *([] if gradient is None else [gradient])]:
        assert tensor.is_contiguous(memory_format=case.memory_format(shape))
        assert tensor.is_contiguous() != case.channels_last
    theirs, ours = (layer(*inputs) for layer in bench.layers(case, shape))
    torch.testing.assert_close(ours, theirs)
    assert (theirs.min() == 0) == (case.activation == "relu")


@pytest.mark.parametrize("shape", SMALL, ids=bench_cases.shape_name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_times_all_in_turn_and_counts_what_torch_saves(case: Case, shape: tuple[int, ...]) -> None:
    if not case.fits(shape):
        return
    result = bench.measure(case, shape, NO_TIME)
    assert (result.case, result.shape, result.elements) == (case.name, shape, math.prod(shape))
    assert set(result.timings) == {TORCH, OURS, FLOOR}
    assert all(timing.rounds == LEAST_ROUNDS and timing.ms > 0 for timing in result.timings.values())
    # The input, mean and 1/std per channel, and the ReLU's output.
    tensors = 1 + (case.activation == "relu")
    assert result.saved_bytes[TORCH] == 4 * (tensors * math.prod(shape) + 2 * shape[1])
    assert result.saved_bytes[OURS] > 0
    assert result.notes == ()


def test_a_contender_is_timed_without_its_gradients() -> None:
    x = torch.ones(3, requires_grad=True)
    seen = []

    def step() -> None:
        seen.append(x.grad)
        x.sum().backward()

    assert Contender(step, [x]).seconds(4) > 0
    assert seen == [None] * 4
    assert x.grad is None


def test_every_round_has_each_once_and_short_calls_are_repeated() -> None:
    calls: list[str] = []

    def long() -> None:
        calls.append("long")
        time.sleep(0.001)

    timings = take_turns(
        {"short": Contender(lambda: calls.append("short")), "long": Contender(long)}, NO_TIME
    )
    assert [timing.rounds for timing in timings.values()] == [LEAST_ROUNDS] * 2
    assert calls.count("long") == 2 + LEAST_ROUNDS
    assert 2 + LEAST_ROUNDS < calls.count("short") <= 2 + LEAST_ROUNDS * 100
    assert timings["short"].ms < timings["long"].ms
    assert take_turns({"short": Contender(int)}, 0.01)["short"].rounds > LEAST_ROUNDS


def test_timing_of_samples() -> None:
    assert Timing.of([0.001, 0.002, 0.003, 0.004, 0.005]) == Timing(3.0, 2.0, 5)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_paused_and_restored(enabled: bool) -> None:
    states = []

    def interrupted() -> None:
        states.append(gc.isenabled())
        raise KeyboardInterrupt

    try:
        if not enabled:
            gc.disable()
        take_turns({"a": Contender(lambda: states.append(gc.isenabled()))}, NO_TIME)
        with pytest.raises(KeyboardInterrupt):
            take_turns({"a": Contender(interrupted)}, NO_TIME)
        with pytest.raises(KeyboardInterrupt):
            held_bytes(interrupted)
        assert not any(states[:-1])
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    with gc_paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_held_bytes_are_those_of_the_result() -> None:
    workspace: list[torch.Tensor] = []

    def cycle() -> None:
        knot: list[Any] = [torch.ones(1000)]
        knot.append(knot)

    def make() -> Any:
        if not workspace:
            workspace.append(torch.ones(5000))
        cycle()
        torch.ones(3000).sum()
        kept = torch.ones(7, 100)
        return kept.exp(), kept.view(-1), kept

    assert held_bytes(make) == 2 * 4 * 700
    assert held_bytes(lambda: None) == 0
    assert held_bytes(make) == 2 * 4 * 700


@pytest.fixture
def _no_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # it imports the compiler, for seconds


@pytest.mark.usefixtures("_no_reset")
def test_torch_compile_is_one_more_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_(layer: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(layer)
        return layer

    monkeypatch.setattr(torch, "compile", compile_)
    result = bench.measure(CASES["forward+backward residual relu"], (4, 6), NO_TIME, compiled=True)
    assert set(result.timings) == {TORCH, COMPILED, OURS, FLOOR}
    assert result.notes == ()
    assert len(compiled) == 1


@pytest.mark.usefixtures("_no_reset")
def test_torch_compile_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(layer: Callable[..., Any]) -> Callable[..., Any]:
        raise RuntimeError("no linker\nand a long tale")

    monkeypatch.setattr(torch, "compile", compile_)
    result = bench.measure(CASES["forward"], (4, 6), NO_TIME, compiled=True)
    assert set(result.timings) == {TORCH, OURS, FLOOR}
    assert result.notes == ("torch.compile failed: no linker",)


def test_summaries() -> None:
    small, large, huge, larger = (4, 6), (500, 100), (1000, 1000), (2000, 1000)
    results = [
        made_up("forward+backward", small, torch=9, ours=10, floor=1),
        made_up("forward+backward", large, torch=20, ours=10, floor=1),
        made_up("forward+backward", huge, torch=80, ours=10, floor=5),
        made_up("forward+backward", larger, torch=40, ours=40, floor=5),
        made_up("forward", small, torch=30, ours=10, floor=1),
    ]
    summaries = bench_results.speedups(results)
    assert summaries["forward"] == Summary(None, 0, 3.0, small)
    overall = summaries["forward+backward"]
    assert overall.mean == pytest.approx((2 * 8 * 1) ** (1 / 3))
    assert replace(overall, mean=None) == Summary(None, 3, 0.9, small)
    floor = bench_results.over_floor(results)
    assert floor is not None
    assert floor.mean == pytest.approx((2 * 8) ** 0.5)
    assert replace(floor, mean=None) == Summary(None, 2, 8.0, larger)
    assert bench_results.over_floor(results[:2]) is None
    assert results[0].saved_ratio == 0.25


def test_bench_tells_its_steps_and_the_report_is_json() -> None:
    steps: list[int] = []
    pairs = bench_cases.pairs(list(CASES.values()), SMALL[1:3])
    results = bench.bench(pairs, NO_TIME, on_steps=steps.append)
    assert steps == [1] * len(pairs) == [1] * (2 * 4 + 2)
    report = json.loads(json.dumps(bench_results.report(results, NO_TIME)))
    assert [row["case"] for row in report["results"]] == [case.name for case, _ in pairs]
    row = report["results"][-1]
    assert (row["shape"], row["layout"]) == ([2, 3, 4, 5], "channels_last")
    assert row["speedup"] == row["timings"][TORCH]["ms"] / row["timings"][OURS]["ms"]
    assert set(report["speedups"]) == set(CASES)
    assert report["over_floor"] is None
    assert report["threads"] == torch.get_num_threads()
    assert {"cores", "processor"} <= set(report["machine"])
    assert report["versions"]["batchnorm"] == batchnorm.__version__


@pytest.mark.parametrize("compiled", [{}, {"compiled": 30.0}])
def test_picture(compiled: dict[str, float]) -> None:
    one = made_up("forward", (4, 6), torch=10, ours=5, floor=1, **compiled)
    assert figures.layer_speeds([one]).startswith(b"\x89PNG")
    other = made_up("forward+backward", (32, 64, 1000), torch=10, ours=5, floor=1)
    assert figures.layer_speeds([one, other]).startswith(b"\x89PNG")


def test_whole_networks() -> None:
    nets = measure_nets(NO_TIME, stack_size=8, batch=2, image_size=32, width=4)
    # Before the first block, after its convolution and after its ReLU; mean and 1/std; and the loss.
    assert nets.saved_bytes[TORCH] == 4 * ((1 + 2 * 8) * 8**4 + 8 * 2 * 8 + 1)
    assert nets.saved_bytes[OURS] > 0
    assert list(nets.steps) == [NO_NORM, TORCH, OURS]
    assert nets.step_ratio(NO_NORM) == nets.saved_ratio(TORCH) == 1
    plain = json.loads(json.dumps(nets.as_dict()))
    assert plain["images_shape"] == [2, 3, 32, 32]
    assert set(plain["step_ratios"]) == set(nets.steps)


def test_the_memory_efficient_stack_saves_less() -> None:
    nets = measure_nets(NO_TIME, stack_size=8, batch=2, image_size=32, width=4)
    assert nets.saved_ratio(MEMORY_EFFICIENT) < 0.6


def test_the_resnet_is_resnet_18_whichever_layers_it_has() -> None:
    def parameters(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    with torch.device("meta"):
        # torchvision's resnet18(num_classes=10) has as many.
        assert parameters(ResNet18(TAILS[TORCH])) == 11_181_642
        assert parameters(ResNet18(TAILS[NO_NORM])) == 11_181_642 - 2 * 4800
    logits = []
    for name in (TORCH, OURS):
        torch.manual_seed(0)
        logits.append(ResNet18(TAILS[name], width=4)(torch.randn(3, 3, 32, 32)))
    assert logits[0].shape == (3, 10)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_other_dtypes_and_float32_layers(dtype: str) -> None:
    case = CASES["forward+backward residual relu"]
    result = bench.measure(case, (2, 3, 4, 5), NO_TIME, dtype=dtype)
    inputs, gradient = bench.data(case, (2, 3, 4, 5), dtype=DTYPES[dtype])
    assert gradient is not None
    assert {tensor.dtype for tensor in [*inputs, gradient]} == {DTYPES[dtype]}
    assert {p.dtype for layer in bench.layers(case, (2, 3)) for p in layer.parameters()} == {torch.float32}
    assert (result.dtype, result.device) == (dtype, "cpu")


def test_bandwidth_counts_each_tensor_once_per_pass() -> None:
    size = 1000 * 1000
    tensors = {"forward": 2, "forward+backward relu": 5, "forward+backward residual relu": 8}
    for case, count in tensors.items():
        result = replace(made_up(case, (1000, 1000), torch=9, ours=2, floor=1), dtype="bfloat16")
        assert result.bandwidth == pytest.approx(count * size * 2 / 2e-3 / 1e9)
        copies = 5 if "backward" in case else 2
        assert result.copy_bandwidth == pytest.approx(copies * size * 2 / 1e-3 / 1e9)


def test_tables_of_a_gpu_say_what_share_of_a_copy() -> None:
    result = made_up("forward+backward", (1000, 1000), torch=20, ours=8, floor=6, compiled=12)
    result.timings[TORCH_OTHER_LAYOUT] = Timing(25.0, 1.0, 7)
    result = replace(result, device="cuda", dtype="bfloat16")
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(*tables.bench([result], None), sep="\n")
    text = captured.get()
    assert "forward+backward bfloat16" in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("1000x1000"))
    assert row[1:9] == ["20.0", "25.0", "12.0", "8.000", "6.000", "2.50", "1.33", "1"]
    assert "75%" in row
    assert "75% of the copies' bandwidth, torch.compile's time / ours 1.50" in text


def test_a_gpus_shapes_are_resnet50s_at_batch_128() -> None:
    assert {shape[0] for shape in GPU_SHAPES["resnet50"]} == {128}
    assert len(GPU_SHAPES["resnet50"]) == 12


def test_the_clock_is_any_function() -> None:
    calls: list[int] = []

    def clock(contender: Contender, count: int) -> float:
        calls.append(count)
        return 50e-6

    timings = take_turns({"a": Contender(int)}, NO_TIME, clock)
    assert timings["a"] == Timing(pytest.approx(0.05), pytest.approx(0.0), LEAST_ROUNDS)
    assert calls == [1, 1, *[4] * LEAST_ROUNDS]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: str) -> None:
    case = CASES["forward+backward relu channels_last"]
    result = bench.measure(case, (32, 64, 56, 56), 0.1, device="cuda", dtype=dtype)
    assert set(result.timings) == {TORCH, TORCH_OTHER_LAYOUT, OURS, FLOOR}
    assert all(timing.ms > 0 for timing in result.timings.values())
    assert 0 < result.bandwidth < 2 * result.copy_bandwidth
    assert result.saved_ratio < 0.6
