"""observe: run a handful of batches through the model, keep what the checks need, and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from batchnorm.doctor.check import CHECKS, Check, check
from batchnorm.doctor.data import mates, processes, steps
from batchnorm.doctor.data.layers import Layer, layers_of
from batchnorm.doctor.data.noise import Population, population
from batchnorm.doctor.data.outputs import kept, score
from batchnorm.doctor.data.padding import Padding
from batchnorm.doctor.data.watch import NotFinite, Pass, Watch
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.pictures import LayerPicture
from batchnorm.doctor.snapshot import unchanged
from batchnorm.doctor.subject import Subject
from batchnorm.model.calling import call, evaluating, to_device, uncompiled, unwrapped

_STEPS = 3
_SHOWN = 300


@dataclass
class Observed:
    """What a handful of batches showed; checks read it.

    Attributes:
        layers: the observed layers, in order of execution, then those that no data reached.
        never_moved: layers whose running statistics were those of a new layer.
        by_batch: each layer normalised by the batch, all else in eval mode.
        by_running: eval mode.
        recalibrated: eval mode, with the population statistics in place of the running ones; or None.
        populations: of each layer's inputs in `by_batch`.
        not_finite: the first inf or NaN.
        moved_in_eval: by layer, how far its statistics moved in eval mode, in standard deviations.
        in_training_mode: layers that were in training mode although the model was put in eval mode.
        largest: the largest output of each channel in `by_batch`.
        rectified: layers whose output goes into a ReLU.
        padding: by layer.
        steps: of training.
        mates: the same samples in another batch, or None.
        processes: what the processes of the default group have, or None.
        failure: of a forward.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    never_moved: set[str] = field(default_factory=set)
    by_batch: Pass = field(default_factory=Pass)
    by_running: Pass = field(default_factory=Pass)
    recalibrated: Pass | None = None
    populations: dict[str, Population] = field(default_factory=dict)
    not_finite: NotFinite | None = None
    moved_in_eval: dict[str, float] = field(default_factory=dict)
    in_training_mode: set[str] = field(default_factory=set)
    largest: dict[str, Tensor] = field(default_factory=dict)
    rectified: set[str] = field(default_factory=set)
    padding: dict[str, Padding] = field(default_factory=dict)
    steps: steps.Steps = field(default_factory=steps.Steps)
    mates: mates.Mates | None = None
    processes: processes.Processes | None = None
    failure: Finding | None = None

    def pictures(self) -> list[LayerPicture]:
        """Running against population statistics, of each layer that has both."""
        found = []
        for name, seen in self.populations.items():
            statistics = self.layers[name].statistics
            if statistics is not None:
                found.append(LayerPicture(name, *statistics, seen.mean, seen.var))
        return found


@check(
    "BN200",
    "the forward raises",
    severity="error",
    why="What comes after it was not examined.",
    fix="Give the batches that the model takes, or forward=lambda model, batch: ...",
    needs_data=True,
)
def raises(check: Check, subject: Subject) -> Iterator[Finding]:
    if subject.observed.failure is not None:
        yield subject.observed.failure


def total_steps(subject: Subject) -> int:
    """How often `observe` calls `on_steps(1)` where nothing fails."""
    return 3 * len(subject.batches) + _STEPS + 1


def observe(subject: Subject, on_steps: Callable[[int], None] = lambda steps: None) -> Observed:
    """Run the batches through the model: by the batch, in eval mode, recalibrated, and some training steps.

    Args:
        subject: its `batches` go through its `model`, which is left exactly as it was, whatever happens.
        on_steps: called with 1 after each forward, `total_steps(subject)` times.

    Returns:
        what the checks read. A forward that raises ends its pass; what was seen before is there.
    """
    return _Observer(subject, on_steps).run()


class _Observer:
    def __init__(self, subject: Subject, on_steps: Callable[[int], None]) -> None:
        self.subject, self.on_steps = subject, on_steps
        self.network = unwrapped(subject.model)
        self.observed = Observed()

    def run(self) -> Observed:
        seen, batches = self.observed, self.subject.batches
        layers = seen.layers = layers_of(self.subject)
        if not batches:
            return seen
        seen.never_moved = {name for name, layer in layers.items() if layer.never_moved}
        with unchanged(self.subject.model) as found:
            watch = self._pass(by_batch=True)
            seen.by_batch, seen.padding = watch.seen, watch.padding
            seen.largest, seen.rectified = watch.largest, watch.rectified
            self._order()
            seen.populations = {name: population(calls) for name, calls in seen.by_batch.statistics.items()}
            first_bad = watch.not_finite
            found.restore()
            watch = self._pass(by_batch=False)
            seen.by_running = watch.seen
            seen.in_training_mode = watch.in_training_mode - {n for n, one in layers.items() if one.frozen}
            seen.not_finite = watch.not_finite or first_bad
            if seen.failure is None and seen.not_finite is None:
                found.restore()
                self._recalibrate()
                found.restore()
                self._mates()
            found.restore()
            self._train()
        seen.processes = processes.gather(self.network, seen.populations)
        return seen

    def _pass(self, *, by_batch: bool) -> Watch:
        watch = Watch(self.network, self.observed.layers, by_batch=by_batch)
        with watch.on():
            for number, batch in enumerate(self.subject.batches):
                watch.begin(number)
                before = {name: layer.statistics for name, layer in self.observed.layers.items()}
                try:
                    with evaluating(self.network):
                        output = self._call(batch, number)
                except Exception as error:
                    self._fail(error, watch.inside[-1] if watch.inside else None, number)
                    break
                finally:
                    if not by_batch:
                        self._note_moves(before)
                watch.seen.outputs.append(kept(output))
                self._score(watch, output, batch)
                self.on_steps(1)
        return watch

    def _call(self, batch: Any, number: int) -> Any:
        return call(self.network, batch, self.subject.forward, "diagnose", f"batch {number + 1}")

    def _score(self, watch: Watch, output: Any, batch: Any) -> None:
        device = next((tensor.device for tensor in self.network.parameters()), None)
        try:
            watch.seen.scores.append(score(output, to_device(batch, device), self.subject.loss))
        except Exception as error:
            self._fail(error, None, watch.batch, "the loss")

    def _note_moves(self, before: dict[str, tuple[Tensor, Tensor] | None]) -> None:
        """In eval mode nothing may move; what did is put back, so that all batches find the same."""
        for name, layer in self.observed.layers.items():
            moved, statistics = steps.moved(before[name], layer.statistics), before[name]
            if moved > 0 and statistics is not None:
                self.observed.moved_in_eval[name] = max(moved, self.observed.moved_in_eval.get(name, 0.0))
                layer.write(*statistics)

    def _fail(self, error: Exception, layer: str | None, number: int, what: str = "the forward") -> None:
        if self.observed.failure is not None:
            return
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        message = " ".join(str(cause).split())[:_SHOWN]
        module = None if not layer else type(self.network.get_submodule(layer)).__name__
        where = f" in {module} {layer!r}" if layer else ""
        self.observed.failure = CHECKS["BN200"].finding(
            layer or None,
            f"{what} raises {type(cause).__name__}{where} on batch {number + 1}: {message}",
            batch=number + 1,
            error=type(cause).__name__,
        )

    def _order(self) -> None:
        reached = list(self.observed.by_batch.statistics)
        layers = self.observed.layers
        self.observed.layers = {name: layers[name] for name in [*reached, *layers]}

    def _recalibrate(self) -> None:
        written = False
        for name, seen in self.observed.populations.items():
            layer = self.observed.layers[name]
            if layer.running is not None and not layer.frozen:
                layer.write(seen.mean, seen.var)
                written = True
        if written:
            self.observed.recalibrated = self._pass(by_batch=False).seen

    def _mates(self) -> None:
        def run(batch: Any) -> Any:
            with evaluating(self.network):
                return self._call(batch, 0)

        try:
            self.observed.mates = mates.compare(self.network, self.subject.batches, run)
        except Exception:  # a batch that cannot be taken apart says nothing about the model
            self.observed.mates = None
        self.on_steps(1)

    def _train(self) -> None:
        """Training steps, without processes: what is synchronised would wait for the others."""
        seen, batches = self.observed.steps, self.subject.batches
        seen.backward = steps.may_run_backward(self.subject.model)
        for parameter in self.network.parameters():
            parameter.grad = None
        for layer in self.observed.layers.values():
            _train_alone(layer.module)
        frozen = {name for name, layer in self.observed.layers.items() if layer.frozen}
        for name, module in self.network.named_modules():
            # torch's SyncBatchNorm trains on GPUs alone.
            module.train(name not in frozen and not isinstance(module, nn.SyncBatchNorm))
        watch = Watch(self.network, {}, by_batch=False)
        for number in range(_STEPS):
            batch = batches[number % len(batches)]
            try:
                with watch.stack(), uncompiled():
                    watch.begin(number)
                    steps.step(
                        seen,
                        self.network,
                        self.observed.layers,
                        lambda batch=batch, number=number: self._call(batch, number),  # type: ignore[misc]
                        lambda output, batch=batch: self._loss(output, batch),  # type: ignore[misc]
                    )
            except Exception as error:
                if not _one_value(error):
                    inside = watch.inside[-1] if watch.inside else None
                    self._fail(error, inside, number % len(batches), "a training step")
                break
            self.on_steps(1)

    def _loss(self, output: Any, batch: Any) -> Tensor | None:
        if self.subject.loss is None:
            return steps.default_loss(output)
        device = next((tensor.device for tensor in self.network.parameters()), None)
        value = self.subject.loss(output, to_device(batch, device))
        return value if isinstance(value, Tensor) else None


def _train_alone(module: Any) -> None:
    if getattr(module, "sync", False):
        module.sync = False


def _one_value(error: Exception) -> bool:
    """Whether a layer had one value per channel: that is another check's finding."""
    return "more than 1 value per channel" in str(error)
