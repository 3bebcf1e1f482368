"""What a check is, and the table of all of them: code, severity, what it means, why it matters, the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.subject import Subject

Evidence = float | int | str | bool | None


@dataclass(frozen=True)
class Check:
    """One thing that the doctor looks for; `find` yields a finding per layer that has it."""

    code: str
    title: str
    severity: Severity
    why: str
    fix: str
    needs_data: bool
    find: Callable[[Subject], Iterable[Finding]]

    def finding(
        self, layer: str | None, what: str, *, severity: Severity | None = None, **evidence: Evidence
    ) -> Finding:
        """A finding of this check; a milder or graver case says its own severity."""
        return Finding(self.code, severity or self.severity, layer, what, evidence, self.why, self.fix)


CHECKS: dict[str, Check] = {}

Find = Callable[[Check, Subject], Iterator[Finding]]


def check(
    code: str, title: str, *, severity: Severity, why: str, fix: str, needs_data: bool
) -> Callable[[Find], Find]:
    """Register a function `(check, subject) -> findings` under its code; `needs_data`: what was observed."""

    def register(find: Find) -> Find:
        if code in CHECKS:
            raise ValueError(f"two checks have the code {code}")
        entry = Check(code, title, severity, why, fix, needs_data, lambda subject: ())

        def find_with_what_it_needs(subject: Subject) -> Iterable[Finding]:
            return () if needs_data and subject.observed is None else find(entry, subject)

        CHECKS[code] = replace(entry, find=find_with_what_it_needs)
        return find

    return register
