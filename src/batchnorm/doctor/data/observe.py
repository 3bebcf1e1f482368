"""observe: run a handful of batches through the model, keep what the checks need, and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from batchnorm.doctor.check import CHECKS, Check, check
from batchnorm.doctor.contents import shuffled
from batchnorm.doctor.data import mates, processes, steps
from batchnorm.doctor.data.differences import Differences
from batchnorm.doctor.data.layers import layers_of
from batchnorm.doctor.data.merge import without_images
from batchnorm.doctor.data.noise import population
from batchnorm.doctor.data.observed import Observed, merged
from batchnorm.doctor.data.outputs import kept, score
from batchnorm.doctor.data.recorder import Pass, PassRecorder
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.snapshot import Snapshot, unchanged
from batchnorm.doctor.subject import Subject
from batchnorm.model.calling import call, evaluating, to_device, uncompiled, unwrapped

_STEPS = 3
_SHOWN = 300


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
    """Runs this rank's batches: `part` is what it sees until the ranks meet, `observed` what all saw."""

    def __init__(self, subject: Subject, on_steps: Callable[[int], None]) -> None:
        self.subject, self.on_steps = subject, on_steps
        self.network = unwrapped(subject.model)
        self.layers = layers_of(subject)
        self.part, self.observed = Observed(), Observed(self.layers)
        self.by_batch = Pass()
        self.alike = True

    def run(self) -> Observed:
        if not self.subject.contents:
            return self.observed
        ranks = self.subject.ranks
        with unchanged(self.subject.model) as found:
            parts = ranks.together(lambda: self._look(found))
            found.restore()
            self.observed = self._merge(parts)
            self._merge_again(ranks.together(lambda: self._look_again(found)))
        if not ranks.given:
            assert parts[0].process is not None
            self.observed.processes = processes.gather(parts[0].process)
        return self.observed

    def _look(self, found: Snapshot) -> Observed:
        """By the batch and in eval mode; what the others need of it."""
        part, layers = self.part, self.layers
        recorder = self._pass(by_batch=True)
        self.by_batch, part.padding = recorder.seen, recorder.padding
        part.largest, part.rectified = recorder.largest, recorder.rectified
        part.not_finite = recorder.not_finite
        part.by_batch = without_images(recorder.seen, calls=2, at_least=2)
        found.restore()
        own = {name: population(calls) for name, calls in part.by_batch.statistics.items()}
        part.process = processes.Process.of(self.network, layers, own)
        recorder = self._pass(by_batch=False)
        part.by_running = without_images(recorder.seen, calls=1, batches=shuffled(self.subject.contents))
        part.of_running = Differences.of(recorder.seen, self.by_batch)
        part.in_training_mode = recorder.in_training_mode - {n for n, one in layers.items() if one.frozen}
        part.not_finite = recorder.not_finite or part.not_finite
        return part

    def _merge(self, parts: list[Observed]) -> Observed:
        """Of models that differ, each rank keeps what its own showed."""
        each = [part.process for part in parts if part.process is not None]
        found = processes.Processes(self.subject.ranks.names, each)
        self.alike = found.alike
        seen = merged(self._of(parts))
        reached = list(seen.by_batch.statistics)
        seen.layers = {name: self.layers[name] for name in [*reached, *self.layers]}
        seen.never_moved = {name for name, layer in self.layers.items() if layer.never_moved}
        seen.processes = None if self.subject.ranks.alone else found
        return seen

    def _of(self, parts: list[Observed]) -> list[Observed]:
        return parts if self.alike else [parts[self.subject.ranks.place]]

    def _look_again(self, found: Snapshot) -> Observed:
        """Recalibrated, with other batch mates, and in training."""
        seen = self.observed
        self.part = Observed(failure=seen.failure)
        if seen.failure is None and seen.not_finite is None:
            self._recalibrate()
            found.restore()
            self._mates()
        found.restore()
        self._train()
        return self.part

    def _merge_again(self, parts: list[Observed]) -> None:
        again, seen = merged(self._of(parts)), self.observed
        seen.recalibrated, seen.of_recalibrated = again.recalibrated, again.of_recalibrated
        seen.mates, seen.steps, seen.failure = again.mates, again.steps, again.failure

    def _pass(self, *, by_batch: bool) -> PassRecorder:
        recorder = PassRecorder(self.network, self.layers, by_batch=by_batch)
        with recorder.on():
            for number, batch in enumerate(self.subject.batches):
                recorder.begin(self.subject.numbers[number])
                before = {name: layer.statistics for name, layer in self.layers.items()}
                try:
                    with evaluating(self.network):
                        output = self._call(batch, number)
                except Exception as error:
                    self._fail(error, recorder.inside[-1] if recorder.inside else None, number)
                    break
                finally:
                    if not by_batch:
                        self._note_moves(before)
                recorder.seen.outputs.append(kept(output))
                self._score(recorder, output, batch, number)
                self.on_steps(1)
        return recorder

    def _call(self, batch: Any, number: int) -> Any:
        return call(self.network, batch, self.subject.forward, "diagnose", f"batch {number + 1}")

    def _score(self, recorder: PassRecorder, output: Any, batch: Any, number: int) -> None:
        device = next((tensor.device for tensor in self.network.parameters()), None)
        try:
            recorder.seen.scores.append(score(output, to_device(batch, device), self.subject.loss))
        except Exception as error:
            self._fail(error, None, number, "the loss")

    def _note_moves(self, before: dict[str, tuple[Tensor, Tensor] | None]) -> None:
        """In eval mode nothing may move; what did is put back, so that all batches find the same."""
        moved_in_eval = self.part.moved_in_eval
        for name, layer in self.layers.items():
            moved, statistics = steps.moved(before[name], layer.statistics), before[name]
            if moved > 0 and statistics is not None:
                moved_in_eval[name] = max(moved, moved_in_eval.get(name, 0.0))
                layer.write(*statistics)

    def _fail(self, error: Exception, layer: str | None, number: int, what: str = "the forward") -> None:
        if self.part.failure is not None:
            return
        ranks = self.subject.ranks
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        message = " ".join(str(cause).split())[:_SHOWN]
        module = None if not layer else type(self.network.get_submodule(layer)).__name__
        where = f" in {module} {layer!r}" if layer else ""
        rank = {} if ranks.alone else {"rank": ranks.names[ranks.place]}
        whose = f" of rank {rank['rank']}" if rank else ""
        self.part.failure = CHECKS["BN200"].finding(
            layer or None,
            f"{what} raises {type(cause).__name__}{where} on batch {number + 1}{whose}: {message}",
            batch=number + 1,
            error=type(cause).__name__,
            severity=None,
            **rank,
        )

    def _recalibrate(self) -> None:
        written = False
        for name, of_layer in self.observed.populations.items():
            layer = self.layers[name]
            if layer.running is not None and not layer.frozen:
                layer.write(of_layer.mean, of_layer.var)
                written = True
        if written:
            seen = self._pass(by_batch=False).seen
            self.part.recalibrated = Pass(scores=seen.scores)
            self.part.of_recalibrated = Differences.of(seen, self.by_batch)

    def _mates(self) -> None:
        def run(batch: Any) -> Any:
            with evaluating(self.network):
                return self._call(batch, 0)

        if not self.subject.batches:
            return
        try:
            self.part.mates = mates.compare(self.network, self.subject.batches, run)
        except Exception:  # a batch that cannot be taken apart says nothing about the model
            self.part.mates = None
        self.on_steps(1)

    def _train(self) -> None:
        """Training steps, without processes: what is synchronised would wait for the others."""
        seen, batches = self.part.steps, self.subject.batches
        if not batches:
            return
        steps.stand_in(self.network)
        for layer in self.layers.values():
            _train_alone(layer.module)
        frozen = {name for name, layer in self.layers.items() if layer.frozen}
        for name, module in self.network.named_modules():
            # torch's SyncBatchNorm trains on GPUs alone.
            module.train(name not in frozen and not isinstance(module, nn.SyncBatchNorm))
        recorder = PassRecorder(self.network, {}, by_batch=False)
        for number in range(_STEPS):
            batch = batches[number % len(batches)]
            try:
                with recorder.stack(), uncompiled():
                    recorder.begin(number)
                    steps.step(
                        seen,
                        self.network,
                        self.layers,
                        lambda batch=batch, number=number: self._call(batch, number),  # type: ignore[misc]
                        lambda output, batch=batch: self._loss(output, batch),  # type: ignore[misc]
                    )
            except Exception as error:
                if not _one_value(error):
                    inside = recorder.inside[-1] if recorder.inside else None
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
