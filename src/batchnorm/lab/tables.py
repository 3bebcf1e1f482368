"""What `batchnorm bench` and `batchnorm compare` have found, as tables for a terminal."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.lab import bench_results
from batchnorm.lab.bench_cases import shape_name
from batchnorm.lab.bench_nets import Nets
from batchnorm.lab.bench_results import COMPILED, FLOOR, HUGE, LARGE, OURS, TORCH, TORCH_OTHER_LAYOUT, Result
from batchnorm.lab.compare import Comparison
from batchnorm.lab.machine import machine_line

# What `bench` times, as the headings of its tables have it.
_TIMED = {
    TORCH: "ms,\ntorch\n.nn",
    TORCH_OTHER_LAYOUT: "other\nlay-\nout",
    COMPILED: "ms,\ncom-\npiled",
    OURS: "ms,\nours",
    FLOOR: "ms,\nfloor",
}
_PEER = "ms,\n{}"


def comparison(result: Comparison) -> Table:
    """A row per norm: accuracy, speed, and memory that grows."""
    config = result.config
    table = Table(
        title=f"LeNet on {config.data}, {config.recipe} recipe, batch {config.batch_size}, "
        f"{config.epochs} epochs",
        caption="memory: batches of at most 32; ¹ forwards in training mode without a backward",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("\n\nnorm", no_wrap=True)
    for heading in (
        "accuracy,\nrunning\nstatistics",
        "accuracy,\ntest-batch\nstatistics",
        f"steps/s\nvs\n{result.baseline}",
        "KiB/100\ntrain\nsteps",
        "KiB/100\ntest\nsteps¹",
        "nodes/\n100\nsteps",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            row.norm,
            *(
                str(accuracy) if result.seeds > 1 else f"{accuracy.mean:.3f}"
                for accuracy in (row.accuracy, row.accuracy_by_batch)
            ),
            f"{row.relative_speed:.2f}",
            f"{row.memory.train_kib:.0f}",
            f"{row.memory.test_kib:.0f}",
            f"{row.memory.graph_nodes:.0f}",
        )
    return table


def bench(results: Sequence[Result], nets: Nets | None) -> Iterator[Table | str]:
    """A table per case, one of the networks, a summary, and what must be said about them."""
    for case in dict.fromkeys(result.case for result in results):
        yield _case_table(case, [result for result in results if result.case == case])
    if nets is not None:
        yield from _nets_tables(nets)
    yield _summary_table(results)
    yield "floor: x.clone(), with backward x + gradient too; saved: what a layer keeps, its input included"
    yield _floor_line(results)
    if results[0].device != "cpu":
        yield (
            "by the GPU's events, its second-level cache emptied before each call; GB/s: bytes that any "
            "batch norm must move, each tensor once per pass; of copy: as a share of the floor's"
        )
        for case, (share, compiled) in bench_results.means_on_gpu(results).items():
            beside = "" if compiled is None else f", torch.compile's time / ours {compiled:.2f}"
            yield f"{case}, geometric means: {share:.0%} of the copies' bandwidth{beside}"
    for note, count in Counter(note for result in results for note in result.notes).items():
        yield f"{note} ({count} of {len(results)})"
    yield _rounds_line(results)
    threads = torch.get_num_threads()
    yield f"{machine_line()}, {threads} thread{'s' if threads > 1 else ''}"


def moved_statistics(model: nn.Module, before: Mapping[str, Tensor]) -> Table:
    """How far the running statistics of each batch norm are from what its buffers were before."""
    table = _table(
        "running statistics, now against before",
        "layer",
        "channels",
        "mean moved by\n(deviations),\nmedian",
        "\nmost",
        "variance\nnow / before,\nleast",
        "\nmost",
    )
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm) or layer.running_mean is None or layer.running_var is None:
            continue
        prefix = f"{name}." if name else ""
        old_mean, old_var = before[f"{prefix}running_mean"], before[f"{prefix}running_var"]
        moved = (layer.running_mean - old_mean).abs() / (layer.running_var + layer.eps).sqrt()
        ratio = layer.running_var / old_var
        numbers = (moved.median(), moved.max(), ratio.min(), ratio.max())
        table.add_row(name, str(layer.num_features), *(f"{number.item():.3g}" for number in numbers))
    return table


def _case_table(case: str, results: Sequence[Result]) -> Table:
    present = {name for result in results for name in result.timings}
    timed = [name for name in _TIMED if name in present] + sorted(present - _TIMED.keys())
    on_gpu = results[0].device != "cpu"
    dtype = results[0].dtype
    table = _table(
        case if dtype == "float32" else f"{case} {dtype}",
        "shape",
        *(_TIMED.get(name, _PEER.format("\n".join(name.split()))) for name in timed),
        *(
            "torch/\nours",
            "ours/\nfloor",
            *(("GB/s,\nours", "of\ncopy") if on_gpu else ()),
            "KiB\nsaved,\ntorch",
            "KiB\nsaved,\nours",
            "ours/\ntorch",
        ),
        tight=COMPILED in timed or on_gpu,
    )
    for result in results:
        saved = result.saved_bytes
        table.add_row(
            shape_name(result.shape),
            *(_ms(result.timings[name].ms) if name in result.timings else "-" for name in timed),
            f"{result.speedup:.2f}",
            f"{result.over_floor:.2f}",
            *(
                (f"{result.bandwidth:,.0f}", f"{result.bandwidth / result.copy_bandwidth:.0%}")
                if on_gpu
                else ()
            ),
            _kib(saved[TORCH]),
            _kib(saved[OURS]),
            f"{result.saved_ratio:.2f}",
        )
    return table


def _nets_tables(nets: Nets) -> tuple[Table, Table]:
    stack = _table(
        f"8 x (3x3 convolution, batch norm, ReLU) on {shape_name(nets.stack_shape)}",
        "",
        "KiB saved\nfor backward",
        "of torch.nn's",
    )
    for name, saved in nets.saved_bytes.items():
        stack.add_row(name, _kib(saved), f"{nets.saved_ratio(name):.2f}")
    steps = _table(
        f"ResNet-18, forward+backward on {shape_name(nets.images_shape)}", "", "ms", "of the time\nwithout"
    )
    for name, timing in nets.steps.items():
        steps.add_row(name, _ms(timing.ms), f"{nets.step_ratio(name):.2f}")
    return stack, steps


def _summary_table(results: Sequence[Result]) -> Table:
    table = _table(
        "torch.nn's time / ours: above 1 ours is faster",
        "case",
        f"mean¹,\n{LARGE:,}\nelements\nand more",
        "shapes",
        "worst\nof all",
        "on",
        caption="¹ geometric",
    )
    for case, summary in bench_results.speedups(results).items():
        mean = "-" if summary.mean is None else f"{summary.mean:.2f}"
        worst = f"{summary.worst:.2f}"
        table.add_row(case, mean, str(summary.shapes), worst, shape_name(summary.worst_shape))
    return table


def _floor_line(results: Sequence[Result]) -> str:
    summary = bench_results.over_floor(results)
    if summary is None:
        return f"no forward+backward of a shape of {HUGE:,} elements to hold against the floor"
    return (
        f"forward+backward, ours / floor, for {HUGE:,} elements and more ({summary.shapes} of the "
        f"shapes): geometric mean {summary.mean:.2f}, worst {summary.worst:.2f} on "
        f"{shape_name(summary.worst_shape)}"
    )


def _rounds_line(results: Sequence[Result]) -> str:
    timings = [timing for result in results for timing in result.timings.values()]
    rounds = [timing.rounds for timing in timings]
    spread = statistics.median(timing.spread_ms / timing.ms for timing in timings)
    return (
        f"medians of {min(rounds)} to {max(rounds)} rounds, in turn; the interquartile range is typically "
        f"{spread:.0%} of the median"
    )


def _table(title: str, first: str, *others: str, caption: str | None = None, tight: bool = False) -> Table:
    padding = (0, 0, 0, 0 if tight else 1)
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=padding)
    lines = max(heading.count("\n") for heading in others)
    table.add_column("\n" * lines + first, no_wrap=True)
    for heading in others:
        table.add_column("\n" * (lines - heading.count("\n")) + heading, justify="right", no_wrap=True)
    return table


def _ms(ms: float) -> str:
    """Three digits or so, in at most six characters."""
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _kib(size: int) -> str:
    return f"{size / 1024:,.0f}" if size >= 10 * 1024 else f"{size / 1024:.1f}"
