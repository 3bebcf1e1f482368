"""A finding: what one check says about one layer, with the numbers that show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["note", "warning", "error"]

SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One fault of one layer, the evidence for it, and what to do.

    Attributes:
        code: the check's stable code, such as `"BN101"`.
        severity: `"note"` (worth knowing), `"warning"` (costs accuracy, memory or time) or `"error"`
            (results are wrong).
        layer: the layer's qualified name, or None where the fault is the whole model's.
        what: what is wrong, in one sentence with its numbers.
        evidence: the numbers by name, ready for JSON.
        why: why it matters, in one sentence.
        fix: what to do.
    """

    code: str
    severity: Severity
    layer: str | None
    what: str
    evidence: Mapping[str, float | int | str | bool | None]
    why: str
    fix: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
