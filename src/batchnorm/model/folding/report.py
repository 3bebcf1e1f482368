"""What fold did to a model: which batch norms went where, which did not and why, errors and savings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Folded:
    """A batch norm, and the layer whose weights now do its work, by their qualified names."""

    layer: str
    into: str

    def __str__(self) -> str:
        return f"{self.layer} -> {self.into}"


@dataclass(frozen=True)
class NotFolded:
    """A module by its qualified name, and why it is not folded."""

    layer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason}"


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did; `print` it.

    Args:
        folded: batch norms in the weights of other layers; one that several layers read is listed with each.
        multiply_adds: batch norms that are now one multiply-add per channel, and why they are not folded.
        left_alone: batch norms that are as they were, and why.
        untraced: modules whose graph torch.fx could not trace, and its error; only their parts are folded.
        assumed: arguments whose values decide the path through a module ("decoder: upsample=True"): the copy
            is that of the example's values.
        by_example: batch norms that are folded as the example shows, in forwards that torch.fx cannot trace:
            it holds for other inputs that were tried, but not all paths through such a forward are known.
        error: largest difference of the copy's output from that of the model in float64, relative to the
            latter's largest value, each run in its own dtype.
        error_unfolded: the same of the model itself: the rounding that was there before.
        error_float64: the same of a float64 copy of the folded model; checked against `tolerance`.
        tolerance: what `error_float64` was allowed.
        parameters_before: number of values in the model's Parameters and buffers.
        parameters_after: the same of the copy.
        operations_saved: multiplications and additions in a forward pass of the example that are gone.
    """

    folded: tuple[Folded, ...]
    multiply_adds: tuple[NotFolded, ...]
    left_alone: tuple[NotFolded, ...]
    untraced: tuple[NotFolded, ...]
    assumed: tuple[str, ...]
    by_example: tuple[str, ...]
    error: float
    error_unfolded: float
    error_float64: float
    tolerance: float
    parameters_before: int
    parameters_after: int
    operations_saved: int

    @property
    def parameters_saved(self) -> int:
        """Values in Parameters and buffers that the copy does without."""
        return self.parameters_before - self.parameters_after

    def __str__(self) -> str:
        parts = {
            "folded": self.folded,
            "now a multiply-add": self.multiply_adds,
            "left alone": self.left_alone,
            "not traced as a whole": self.untraced,
            "for these arguments only": self.assumed,
            "as the example shows": self.by_example,
        }
        lines = []
        for title, entries in parts.items():
            if entries:
                lines.append(f"{title} ({len(entries)})")
                lines.extend(f"  {entry}" for entry in entries)
        lines.append(
            f"relative error {self.error:.1e} (before folding {self.error_unfolded:.1e}); "
            f"in float64 {self.error_float64:.1e}, allowed {self.tolerance:.1e}"
        )
        lines.append(
            f"{self.parameters_saved:,} of {self.parameters_before:,} parameters and buffers and "
            f"{self.operations_saved:,} operations per forward saved"
        )
        return "\n".join(lines)
