"""From how many values on the Triton kernels are used instead of torch's own operators.

No number in this file has been measured: no GPU was at hand. `python benchmarks/gpu.py --crossovers` measures
them and prints this table, to be put in the place of the one below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple


class Kind(NamedTuple):
    """Calls that share a threshold.

    Attributes:
        training: normalises by the batch, rather than by running statistics.
        fused: with an activation or a residual.
        rows: channels last in memory.
        half: in half precision.
    """

    training: bool
    fused: bool
    rows: bool
    half: bool


KINDS = [Kind(*flags) for flags in product((True, False), repeat=4)]

# None: never. For fewer values torch's operator is done before two or three kernels have been launched from
# Python; a batch norm alone moves as few bytes by torch's.
LEAST_VALUES: dict[Kind, int | None] = {
    Kind(training=True, fused=True, rows=True, half=True): 1 << 20,
    Kind(training=True, fused=True, rows=True, half=False): 1 << 20,
    Kind(training=True, fused=True, rows=False, half=True): 1 << 20,
    Kind(training=True, fused=True, rows=False, half=False): 1 << 20,
    Kind(training=True, fused=False, rows=True, half=True): None,
    Kind(training=True, fused=False, rows=True, half=False): None,
    Kind(training=True, fused=False, rows=False, half=True): None,
    Kind(training=True, fused=False, rows=False, half=False): None,
    Kind(training=False, fused=True, rows=True, half=True): 1 << 20,
    Kind(training=False, fused=True, rows=True, half=False): 1 << 20,
    Kind(training=False, fused=True, rows=False, half=True): 1 << 20,
    Kind(training=False, fused=True, rows=False, half=False): 1 << 20,
    Kind(training=False, fused=False, rows=True, half=True): None,
    Kind(training=False, fused=False, rows=True, half=False): None,
    Kind(training=False, fused=False, rows=False, half=True): None,
    Kind(training=False, fused=False, rows=False, half=False): None,
}


def worthwhile(kind: Kind, values: int) -> bool:
    """Whether the kernels ought to be as fast as torch's operators on so many values."""
    least = LEAST_VALUES[kind]
    return least is not None and values >= least


@contextmanager
def everywhere(values: int = 1) -> Iterator[None]:
    """Inside, the kernels are used from so many values on, whatever the kind: to be measured or tested."""
    before = dict(LEAST_VALUES)
    LEAST_VALUES.update(dict.fromkeys(KINDS, values))
    try:
        yield
    finally:
        LEAST_VALUES.update(before)


def as_python(least: dict[Kind, int | None]) -> str:
    """The table as it stands in this file."""
    lines = [
        f"    {kind!r}: {None if values is None else f'1 << {values.bit_length() - 1}'},"
        for kind, values in least.items()
    ]
    return "\n".join(["LEAST_VALUES: dict[Kind, int | None] = {", *lines, "}"])
