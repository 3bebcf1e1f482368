"""Hand-written batch norms: statistics that are not saved, that stay behind, that keep the autograd graph."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject


@check(
    "BN120",
    "statistics missing from the state_dict",
    severity="error",
    why="A saved and loaded model normalises by statistics as when new: eval mode is wrong after loading,"
    " and a tensor that is no buffer stays behind when the model moves to a device or dtype.",
    fix="self.register_buffer('running_mean', ...) in __init__ and in-place updates, or use bn.BatchNorm2d.",
    needs_data=False,
)
def not_saved(check: Check, subject: Subject) -> Iterator[Finding]:
    """An error for a hand-written layer with a running statistic that its state_dict lacks."""
    for name, seen in subject.handwritten.items():
        missing = [kept for kept in seen.kept if not kept.is_saved]
        if missing:
            plain = not any(kept.is_buffer for kept in missing)
            yield check.finding(
                name,
                f"{' and '.join(kept.name for kept in missing)} "
                + ("are plain attributes, no buffers: " if plain else "are buffers with persistent=False: ")
                + "they are missing from the state_dict",
                tensors=", ".join(kept.name for kept in missing),
                is_buffer=not plain,
            )


@check(
    "BN121",
    "statistics that keep the autograd graph",
    severity="error",
    why="Every forward links the statistics to all the ones before, with the activations of their "
    "batches: memory grows without end until there is none left.",
    fix="Update them under torch.no_grad() and in place (self.running_mean.lerp_(mean, momentum)), or use"
    " bn.BatchNorm2d.",
    needs_data=False,
)
def keeps_graph(check: Check, subject: Subject) -> Iterator[Finding]:
    """An error for a hand-written layer with a running statistic that requires a gradient after a forward."""
    for name, seen in subject.handwritten.items():
        keeping = [kept for kept in seen.kept if kept.keeps_graph]
        if keeping:
            first, later = seen.graph_nodes
            yield check.finding(
                name,
                f"{' and '.join(kept.name for kept in keeping)} keep the graph of every forward: {first} "
                f"nodes after 1 forward, {later} after 5",
                nodes_after_1=first,
                nodes_after_5=later,
            )


@check(
    "BN122",
    "hand-written batch norm",
    severity="note",
    why="It normalises over the batch and keeps running statistics as torch.nn's layers do, slower and "
    "with more memory, and the verbs on models (recalibrate, freeze, fold) do not know it.",
    fix="Use bn.BatchNorm1d, 2d or 3d with the same momentum and eps.",
    needs_data=False,
)
def by_hand(check: Check, subject: Subject) -> Iterator[Finding]:
    """A note for each hand-written layer, with whether a running variance of its is the biased one."""
    for name, seen in subject.handwritten.items():
        biased = any(kept.correction == 0 for kept in seen.kept)
        module = subject.model.get_submodule(name)
        yield check.finding(
            name,
            f"{type(module).__name__} is a batch norm of {seen.channels} channels by what it does"
            + (", with a biased running variance" if biased else ""),
            channels=seen.channels,
            momentum=seen.kept[0].momentum,
            biased_variance=biased,
        )
