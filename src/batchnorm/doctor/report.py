"""The report of a diagnosis: findings in order of severity, as text, JSON, a page, and with fixes."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.doctor.finding import SEVERITIES, Finding, Severity

if TYPE_CHECKING:
    from batchnorm.doctor.fixes import Fixed
    from batchnorm.doctor.pictures import LayerPicture
    from batchnorm.doctor.subject import Subject

_WIDTH = 80
_MARGIN = 10
# Of one check, so many different sentences; of one sentence, so many layers by name.
_SHOWN = 3
_NAMED = 4


@dataclass(frozen=True)
class Report:
    """What `diagnose` found.

    Attributes:
        model: the class of the model.
        batch_norms: how many it has, hand-written ones included.
        batches: how many batches were run through it, in all processes.
        findings: the gravest first, those of one check together, in the order of the layers.
        pictures: the statistics of its layers, for the page.
    """

    model: str
    batch_norms: int
    batches: int
    findings: tuple[Finding, ...]
    pictures: tuple[LayerPicture, ...] = field(default=(), repr=False)
    _subject: Subject | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, subject: Subject, findings: Sequence[Finding]) -> Report:
        """The findings in `subject`, given in the order of its layers: the gravest first, then by code."""
        from batchnorm.doctor.pictures import pictures_of

        observed = () if subject.observed is None else subject.observed.layers
        ordered = sorted(findings, key=lambda f: (-SEVERITIES.index(f.severity), f.code))
        return cls(
            type(subject.model).__name__,
            len({*subject.batch_norms, *subject.handwritten, *observed}),
            len(subject.contents),
            tuple(ordered),
            tuple(pictures_of(subject)),
            subject,
        )

    @property
    def worst(self) -> Severity | None:
        """The severity of the gravest finding; None without any."""
        return self.findings[0].severity if self.findings else None

    def fix(self, code: str, layer: str | None = None) -> Fixed:
        """Apply the fix of a check, diagnose again, and say before and after.

        A report over a group of processes is fixed by all of them together: each calls this alike.

        Args:
            code: of the findings to fix, such as `"BN101"`.
            layer: of one layer; None is all that the report names.

        Returns:
            what was found before and after, to be printed; `after` is the new report.

        Raises:
            ValueError: no such finding, no safe fix for it, one that not all processes of a group have, or
                one that does not help: the model and the optimizer are then as they were.
            RuntimeError: it raised in another process of the group.
        """
        from batchnorm.doctor.fixes import fix

        assert self._subject is not None
        return fix(self, self._subject, code, layer)

    def __str__(self) -> str:
        """A table for a terminal of 80 columns."""
        return "\n".join([self.headline, *self._table(), *self._advice()])

    @property
    def headline(self) -> str:
        """The model, what was looked at, and how much was found, in a line or two."""
        if not self.batch_norms:
            return f"{self.model} has no batch norm: nothing to diagnose"
        return f"{self.model}: {self.looked_at}: {self.count}"

    @property
    def looked_at(self) -> str:
        """How many batch norms and batches, in words."""
        data = f"{self.batches} batch{'es' * (self.batches != 1)} of data" if self.batches else "no data"
        return f"{self.batch_norms} batch norm{'s' * (self.batch_norms != 1)}, {data}"

    @property
    def count(self) -> str:
        """How many findings there are of each severity, in words."""
        counts = {s: sum(f.severity == s for f in self.findings) for s in reversed(SEVERITIES)}
        words = [f"{n} {severity}{'s' * (n != 1)}" for severity, n in counts.items() if n]
        return ", ".join(words) or "nothing found"

    def by_check(self) -> Iterator[tuple[Severity, str, str, list[Finding]]]:
        """Severity, code, title and findings, for each check that found something."""
        from batchnorm.doctor.check import CHECKS

        for (severity, code), findings in groupby(self.findings, key=lambda f: (f.severity, f.code)):
            yield severity, code, CHECKS[code].title if code in CHECKS else code, list(findings)

    def _table(self) -> Iterator[str]:
        for severity, code, title, findings in self.by_check():
            yield ""
            yield f"{severity:<9} {code}  {title}"
            rows = said_of(findings)
            for layers, what in rows[:_SHOWN]:
                yield from _wrapped(f"{_listed(layers)}: {what}")
            if others := [name for layers, _ in rows[_SHOWN:] for name in layers]:
                yield from _wrapped(f"and {len(others)} more: {_listed(others)}")

    def _advice(self) -> Iterator[str]:
        said: set[str] = set()
        for finding in self.findings:
            if finding.code in said:
                continue
            if not said:
                yield from ("", "What it means, and what to do", "")
            said.add(finding.code)
            yield from _wrapped(finding.why, finding.code)
            yield from _wrapped(f"Fix: {finding.fix}")

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, ready for JSON."""
        return {
            "model": self.model,
            "batch_norms": self.batch_norms,
            "batches": self.batches,
            "worst": self.worst,
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON; a number that is not finite is a string, which JSON has no number for."""
        return json.dumps(_finite(self.to_dict()), indent=2, ensure_ascii=False)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs nothing else, with a picture for each layer; whole or not at all."""
        from batchnorm.doctor.page import page
        from batchnorm.files import write_atomically

        write_atomically(Path(path), page(self).encode())

    def _repr_html_(self) -> str:
        from batchnorm.doctor.page import fragment

        return fragment(self)


def said_of(findings: Sequence[Finding]) -> list[tuple[list[str], str]]:
    """What is said, each with the layers that it is said of."""
    rows: dict[str, list[str]] = {}
    for finding in findings:
        rows.setdefault(finding.what, []).append(finding.layer or "the model")
    return [(layers, what) for what, layers in rows.items()]


def _listed(layers: Sequence[str]) -> str:
    more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
    return ", ".join(layers[:_NAMED]) + more


def _wrapped(text: str, label: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{label:<{_MARGIN}}",
        subsequent_indent=" " * _MARGIN,
        break_on_hyphens=False,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
