"""Pictures of results, as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from batchnorm.lab.bench_results import Result
    from batchnorm.lab.compare import Comparison
    from batchnorm.lab.recipes import Config
    from batchnorm.lab.train import EpochResult

# Okabe & Ito's palette, told apart by colour-blind readers too.
_COLORS = {"none": "#999999", "handwritten": "#D55E00", "torch": "#0072B2", "batchnorm": "#009E73"}
# Marker and color of what is timed beside torch.nn's layer.
_CONTENDERS = {
    "torch.compile": ("^", "#D55E00"),
    "floor": ("|", "#555555"),
    "batchnorm": ("o", _COLORS["batchnorm"]),
}


def training_curves(config: Config, history: Sequence[EpochResult]) -> bytes:
    """Loss and test accuracy against the epoch."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [result.epoch for result in history]
    color = _COLORS[config.norm]
    loss.plot(epochs, [result.loss for result in history], "o-", color=color)
    loss.set(title="training loss", xlabel="epoch", ylabel="cross entropy", ylim=(0, None))
    if config.tutorial_protocol:
        loss.set_ylabel("the tutorial's loss")
        eval_mode = [result.accuracy_eval for result in history]
        accuracy.plot(epochs, eval_mode, "s--", color="#555555", label="running statistics")
    label = "test-batch statistics" if config.tutorial_protocol else "running statistics"
    accuracy.plot(epochs, [result.accuracy for result in history], "o-", color=color, label=label)
    accuracy.set(title="test accuracy", xlabel="epoch")
    accuracy.legend(frameon=False, loc="lower right")
    for axes in (loss, accuracy):
        _tidy(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"LeNet on {config.data}, norm {config.norm}, batch {config.batch_size}")
    return _png(figure)


def comparison(result: Comparison) -> bytes:
    """Accuracy over training, final accuracy by both statistics, and memory growth, per norm."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    curves, final, memory = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    for place, row in enumerate(result.rows):
        color = _COLORS[row.norm]
        epochs = range(1, len(row.accuracy_per_epoch[0]) + 1)
        for accuracies in row.accuracy_per_epoch:
            curves.plot(epochs, accuracies, color=color, alpha=0.25, linewidth=1)
        means = [sum(at) / len(at) for at in zip(*row.accuracy_per_epoch, strict=True)]
        curves.plot(epochs, means, "o-", color=color, label=row.norm, markersize=4)
        for values, marker, shift in ((row.accuracy, "o", -0.12), (row.accuracy_by_batch, "s", 0.12)):
            final.errorbar(
                place + shift, values.mean, values.spread, fmt=marker, color=color, capsize=3, markersize=6
            )
        growth = (row.memory.train_kib, row.memory.test_kib)
        memory.bar(
            [place - 0.2, place + 0.2],
            [max(kib, 1) for kib in growth],
            width=0.36,
            color=[color, "none"],
            edgecolor=color,
        )
    curves.set(title="test accuracy, running statistics", xlabel="epoch")
    curves.legend(frameon=False, loc="lower right")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    final.set_title("final accuracy\n● running statistics   ■ each test batch's own", fontsize=10)
    memory.set_title(
        "memory gained per 100 steps, KiB\nfilled: training   hollow: test in training mode", fontsize=10
    )
    memory.set_yscale("log")
    for axes in (final, memory):
        axes.set_xticks(range(len(result.rows)), [row.norm for row in result.rows])
    for axes in (curves, final, memory):
        _tidy(axes)
    config = result.config
    figure.suptitle(
        f"LeNet on {config.data}, batch {config.batch_size}, {config.epochs} epochs, {result.seeds} seeds"
    )
    return _png(figure)


def layer_speeds(results: Sequence[Result]) -> bytes:
    """Time of each contender relative to torch.nn's, a panel per case and a row per shape."""
    cases = list(dict.fromkeys(result.case for result in results))
    shapes = list(dict.fromkeys(result.shape for result in results))
    shapes.sort(key=lambda shape: (math.prod(shape), shape))
    figure = Figure(figsize=(3 + 2.4 * len(cases), 2 + 0.2 * len(shapes)), layout="constrained")
    panels = figure.subplots(1, len(cases), sharex=True, sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        axes.axvline(1, color=_COLORS["torch"], linewidth=1.5, label="torch.nn")
        for name, (marker, color) in _CONTENDERS.items():
            ratios = [
                (result.timings[name].ms / result.timings["torch.nn"].ms, shapes.index(result.shape))
                for result in results
                if result.case == case and name in result.timings
            ]
            if ratios:
                axes.plot(*zip(*ratios, strict=True), marker, color=color, label=name, markersize=5)
        axes.set_title(case.replace("forward+backward ", "forward+backward\n"), fontsize=10)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
        axes.set_yticks(range(len(shapes)), ["x".join(map(str, shape)) for shape in shapes], fontsize=8)
        axes.set_ylim(-0.7, len(shapes) - 0.3)
        _tidy(axes)
    figure.supxlabel("time relative to torch.nn's (left is faster; floor: a plain copy)", fontsize=10)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4, frameon=False)
    return _png(figure)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()
