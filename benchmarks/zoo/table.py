"""The results of a zoo as a table by family, and what is worth reading under it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from benchmarks.zoo.examine import Result

_COLUMNS = (
    "family", "models", "norms", "frozen", "ours", "fused", "folded", "adds", "left",
    "convert", "recalibrate", "fold", "findings", "seconds",
)  # fmt: skip
_SHOWN = 20


def printed(library: str, results: list[Result]) -> str:
    """The table, then failures, what is left and why, and findings, in Markdown."""
    with_norms = [result for result in results if result.norms or result.frozen or result.failures]
    families: dict[str, list[Result]] = {}
    for result in with_norms:
        families.setdefault(result.family, []).append(result)
    rows = [_row(family, members) for family, members in sorted(families.items())]
    rows.append(_row("all", with_norms))
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'|'.join(['---'] + ['---:'] * (len(_COLUMNS) - 1))}|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"### {library}", "", *lines, *_below(with_norms)])


def _row(family: str, results: list[Result]) -> list[str]:
    numbers = [
        len(results),
        *(sum(getattr(r, name) for r in results) for name in ("norms", "frozen", "taken", "fused", "folded")),
        sum(r.multiply_adds for r in results),
        sum(len(r.left) for r in results),
    ]
    errors = [max((r.errors.get(verb, 0.0) for r in results), default=0.0) for verb in _ERRORS]
    findings = sum(len(r.findings) for r in results)
    seconds = sum(r.seconds for r in results)
    return [
        family, *(f"{n:,}" for n in numbers), *(f"{e:.0e}" if e else "0" for e in errors), f"{findings:,}",
        f"{seconds:,.0f}",
    ]  # fmt: skip


_ERRORS = ("convert", "recalibrate", "fold")


def _below(results: list[Result]) -> Iterator[str]:
    failures = [f"{r.name}, {step}: {what}" for r in results for step, what in r.failures.items()]
    missed = [f"{r.name}: {entry}" for r in results for entry in r.missed]
    sensitive = [
        f"{r.name}: convert differs by {r.errors['convert']:.0e}, "
        f"torch.nn by {r.sensitivity:.0e} when its input moves by 2e-15"
        for r in results
        if r.errors.get("convert", 0.0) > 1e-8
    ]
    yield from _listed("failures", failures)
    yield from _listed("multiply-adds that follow a convolution or a linear layer", missed)
    yield from _listed("sensitive models", sensitive)
    yield from _counted("left, by reason", Counter(_reason(entry) for r in results for entry in r.left))
    yield from _counted("findings above a note, by check", _findings(results))


def _findings(results: list[Result]) -> Counter[str]:
    """In how many models each check finds something."""
    return Counter(
        code for r in results for code in {finding.split(": ")[1].split()[0] for finding in r.findings}
    )


def _reason(entry: str) -> str:
    return ("fold: " if entry.startswith("fold: ") else "convert: ") + entry.rpartition(": ")[2]


def _listed(title: str, entries: list[str]) -> Iterator[str]:
    if entries:
        yield from ["", f"{title} ({len(entries)}):"]
        yield from (f"- {entry}" for entry in entries[:_SHOWN])
        if len(entries) > _SHOWN:
            yield f"- and {len(entries) - _SHOWN} more"


def _counted(title: str, counts: Counter[str]) -> Iterator[str]:
    if counts:
        yield from ["", f"{title}:"]
        yield from (f"- {what}: {count:,}" for what, count in counts.most_common())
