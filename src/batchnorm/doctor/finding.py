"""A finding: what one check says about one layer, with the numbers that show it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from batchnorm.model.packing import sent
from batchnorm.model.ranks import said

Severity = Literal["note", "warning", "error"]

SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")


@sent
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
        """The attributes by name, `evidence` a dictionary of its own."""
        return asdict(self)


def in_order_of_layers(model: nn.Module, findings: Iterable[Finding]) -> list[Finding]:
    """Those of the whole model first, then as the model's modules are listed."""
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(findings, key=lambda finding: places.get(finding.layer or "", -1))


def merged_findings(of_ranks: Sequence[Sequence[Finding]], ranks: Sequence[int]) -> list[Finding]:
    """The findings of all ranks, each once; one that not all of them have says which do.

    Of what several say about a layer, the gravest stands, or the first.
    """
    said_by: dict[tuple[Any, ...], dict[int, Finding]] = {}
    for rank, findings in zip(ranks, of_ranks, strict=True):
        times: dict[tuple[Any, ...], int] = {}
        for finding in findings:
            place = finding.code, finding.layer
            times[place] = times.get(place, 0) + 1
            said_by.setdefault((*place, times[place]), {})[rank] = finding
    merged = []
    for by_rank in said_by.values():
        gravest = max(by_rank.values(), key=lambda finding: SEVERITIES.index(finding.severity))
        if len(by_rank) < len(ranks):
            where = said(list(by_rank))
            evidence = {**gravest.evidence, "ranks": where}
            gravest = replace(gravest, what=f"{gravest.what} (on {where} alone)", evidence=evidence)
        merged.append(gravest)
    return merged
