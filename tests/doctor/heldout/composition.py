"""Faults of composition: predictions that hang on their batch mates, batches that are no random samples."""

from __future__ import annotations

from torch import Tensor, nn

from tests.doctor.data.digits import Make
from tests.doctor.heldout.cases import judged
from tests.doctor.heldout.changes import by_class, followed_by, setting


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0)


SICK: list[tuple[str, Make, str, str | None]] = [
    (
        "no running statistics",
        judged(
            "densenet",
            change=setting("features.6", running_mean=None, running_var=None, track_running_stats=False),
        ),
        "BN216",
        "features.6",
    ),
    (
        "centred over the batch",
        judged("audio", change=followed_by("3", Centred)),
        "BN216",
        "3.1",
    ),
    ("training data in order of class", judged("rep vgg", training=True, on=by_class), "BN217", None),
    ("audio in order of class", judged("audio", training=True, optimizer=True, on=by_class), "BN217", None),
]
