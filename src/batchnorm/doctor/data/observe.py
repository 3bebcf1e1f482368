"""observe: run a handful of batches through the model, keep what the checks need, and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from batchnorm.doctor.contents import shuffled
from batchnorm.doctor.data import mates, processes, steps
from batchnorm.doctor.data.differences import Differences
from batchnorm.doctor.data.failure import failure
from batchnorm.doctor.data.layers import layers_of
from batchnorm.doctor.data.merge import without_images
from batchnorm.doctor.data.noise import population
from batchnorm.doctor.data.observed import Observed, merged
from batchnorm.doctor.data.outputs import kept, score
from batchnorm.doctor.data.watch import Pass, Watch
from batchnorm.doctor.snapshot import Snapshot, unchanged
from batchnorm.doctor.subject import Subject
from batchnorm.model.calling import call, evaluating, to_device, uncompiled, unwrapped

_STEPS = 3
# Tried as the source of other batch mates for the first batch.
_OTHERS = (1, 2)


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
        self.error: Exception | None = None

    def run(self) -> Observed:
        if not self.subject.contents:
            return self.observed
        ranks = self.subject.ranks
        with unchanged(self.subject.model) as found:
            parts = ranks.together(lambda: self._look(found))
            found.restore()
            self.observed = self._merge(parts)
            self._look_again(found)
            self._merge_again(ranks.together(self._seen_again))
        if not ranks.given:
            assert parts[0].process is not None
            self.observed.processes = processes.gather(parts[0].process)
        return self.observed

    def _look(self, found: Snapshot) -> Observed:
        """By the batch and in eval mode; what the others need of it."""
        part, layers = self.part, self.layers
        watch = self._pass(by_batch=True)
        self.by_batch, part.padding = watch.seen, watch.padding
        part.largest, part.rectified, part.not_finite = watch.largest, watch.rectified, watch.not_finite
        part.by_batch = without_images(watch.seen, calls=2, at_least=2)
        found.restore()
        own = {name: population(calls) for name, calls in part.by_batch.statistics.items()}
        part.process = processes.Process.of(self.network, layers, own)
        watch = self._pass(by_batch=False)
        part.by_running = without_images(watch.seen, calls=1, batches=shuffled(self.subject.contents))
        part.of_running = Differences.of(watch.seen, self.by_batch)
        part.in_training_mode = watch.in_training_mode - {n for n, one in layers.items() if one.frozen}
        part.not_finite = watch.not_finite or part.not_finite
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

    def _look_again(self, found: Snapshot) -> None:
        """Recalibrated, with other batch mates, and in training.

        The ranks give each other batches meanwhile, so what fails in one must not end it: see `_attempt`.
        """
        seen = self.observed
        self.part = Observed(failure=seen.failure)
        if seen.failure is None and seen.not_finite is None:
            self._attempt(self._recalibrate)
            self.by_batch = Pass()  # room for batches of other ranks
            self._attempt(found.restore)
            self._mates()
        self._attempt(found.restore)
        self._train()

    def _attempt(self, work: Callable[[], None]) -> None:
        """Unless something has failed; it is raised when no other rank waits for a batch of this one."""
        try:
            if self.error is None:
                work()
        except Exception as error:
            self.error = error

    def _seen_again(self) -> Observed:
        if self.error is not None:
            raise self.error
        return self.part

    def _merge_again(self, parts: list[Observed]) -> None:
        """Of batch mates and steps each rank keeps its own, which were on the same batches.

        Where the ranks do not say the same of them, the report tells which does.
        """
        again, seen = merged(self._of(parts)), self.observed
        seen.recalibrated, seen.of_recalibrated = again.recalibrated, again.of_recalibrated
        seen.failure = again.failure
        # One without batches, where the others' could not be sent, has seen nothing.
        own = parts[self.subject.ranks.place]
        seen.mates = next((part.mates for part in [own, *self._of(parts)] if part.mates), None)
        seen.steps = next((part.steps for part in [own, *self._of(parts)] if part.steps.tried), own.steps)

    def _pass(self, *, by_batch: bool) -> Watch:
        watch = Watch(self.network, self.layers, by_batch=by_batch)
        with watch.on():
            for number, batch in zip(self.subject.numbers, self.subject.batches, strict=True):
                watch.begin(number)
                before = {name: layer.statistics for name, layer in self.layers.items()}
                try:
                    with evaluating(self.network):
                        output = self._call(batch, number)
                except Exception as error:
                    self._fail(error, watch, number)
                    break
                finally:
                    if not by_batch:
                        self._note_moves(before)
                watch.seen.outputs.append(kept(output))
                self._score(watch, output, batch, number)
                self.on_steps(1)
        return watch

    def _call(self, batch: Any, number: int) -> Any:
        named, _ = self.subject.named(number)
        return call(self.network, batch, self.subject.forward, "diagnose", named)

    def _score(self, watch: Watch, output: Any, batch: Any, number: int) -> None:
        device = next((tensor.device for tensor in self.network.parameters()), None)
        try:
            watch.seen.scores.append(score(output, to_device(batch, device), self.subject.loss))
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

    def _fail(self, error: Exception, watch: Watch | None, number: int, what: str = "the forward") -> None:
        if self.part.failure is None:
            self.part.failure = failure(self.subject, error, watch, number, what)

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

    def _batch(self, number: int) -> tuple[int, Any] | None:
        """One for all ranks to look at, and its number; models that differ take batches of their own."""
        subject = self.subject
        return subject.batch_of_all(number) if self.alike else subject.own_batch(number)

    def _mates(self) -> None:
        first = self._batch(0)
        exchanged = None
        for number in _OTHERS[: len(self.subject.contents) - 1]:
            other = self._batch(number)
            if exchanged is None and first is not None and other is not None and other[0] != first[0]:
                exchanged = mates.with_mates_of(first[1], other[1])
        if first is not None:
            self._attempt(lambda: self._compare(*first, exchanged))

    def _compare(self, number: int, batch: Any, exchanged: Any) -> None:
        def run(batch: Any) -> Any:
            with evaluating(self.network):
                return self._call(batch, number)

        try:
            self.part.mates = mates.compare(self.network, batch, exchanged, run)
        except Exception:  # a batch that cannot be taken apart says nothing about the model
            self.part.mates = None
        self.on_steps(1)

    def _train(self) -> None:
        """Training steps, each on the same batch in all ranks."""
        self._attempt(self._ready_to_train)
        watch = Watch(self.network, {}, by_batch=False)
        for step in range(_STEPS):
            batch = self._batch(step % len(self.subject.contents))
            if batch is not None and self.part.steps.tried == self.part.steps.steps:
                self._attempt(lambda batch=batch: self._step(watch, *batch))  # type: ignore[misc]

    def _ready_to_train(self) -> None:
        """Without processes: what is synchronised would wait for the others."""
        steps.stand_in(self.network)
        for layer in self.layers.values():
            _train_alone(layer.module)
        frozen = {name for name, layer in self.layers.items() if layer.frozen}
        for name, module in self.network.named_modules():
            # torch's SyncBatchNorm trains on GPUs alone.
            module.train(name not in frozen and not isinstance(module, nn.SyncBatchNorm))

    def _step(self, watch: Watch, number: int, batch: Any) -> None:
        seen = self.part.steps
        seen.tried += 1
        try:
            with watch.stack(), uncompiled():
                watch.begin(number)
                steps.step(
                    seen,
                    self.network,
                    self.layers,
                    lambda: self._call(batch, number),
                    lambda output: self._loss(output, batch),
                )
        except Exception as error:
            if not _one_value(error):
                seen.failure = failure(self.subject, error, watch, number, "a training step")
        else:
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
