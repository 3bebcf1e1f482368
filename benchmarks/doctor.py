"""What the doctor finds in the corpus of sick and healthy models: a confusion table, code by code.

Run from the repository root:

    python -m benchmarks.doctor

Every sick model has one planted fault: it is found when there is a finding with its code in its layer,
whatever the severity. A finding above a note in a healthy model is wrong. Elsewhere counts other sick models
in which the code was reported too, above a note: many faults show in more than one way.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections import Counter
from types import ModuleType

import torch

import batchnorm as bn
from batchnorm.doctor.check import CHECKS
from batchnorm.doctor.report import Report

CORPORA = ("tests.doctor.corpus", "tests.doctor.corpus_data", "tests.doctor.corpus_heldout")


def diagnosed(make) -> Report:  # type: ignore[no-untyped-def]
    model, batches, options = make()
    return bn.diagnose(model, batches or None, **options)


def main() -> int:
    torch.set_num_threads(1)
    start = time.perf_counter()
    corpora: list[ModuleType] = [importlib.import_module(name) for name in CORPORA]
    sick = [case for corpus in corpora for case in corpus.SICK]
    healthy = [case for corpus in corpora for case in corpus.HEALTHY]
    planted, found, elsewhere, wrong = Counter(), Counter(), Counter(), Counter()
    problems = []
    for name, make, code, layer in sick:
        report = diagnosed(make)
        planted[code] += 1
        if any(finding.code == code and finding.layer == layer for finding in report.findings):
            found[code] += 1
        else:
            problems.append(f"missed: {code} in {layer or 'the model'} of: {name}")
        elsewhere.update({f.code for f in report.findings if f.severity != "note"} - {code})
    for name, make in healthy:
        grave = [finding for finding in diagnosed(make).findings if finding.severity != "note"]
        wrong.update({finding.code for finding in grave})
        problems += [f"wrong: {f.code} in {f.layer or 'the model'} of: {name}: {f.what}" for f in grave]
    print(f"{'code':<6} {'planted':>7} {'found':>5} {'missed':>6} {'wrong':>5} {'elsewhere':>9}  check")
    for code in sorted(CHECKS):
        missed = planted[code] - found[code]
        print(
            f"{code:<6} {planted[code]:>7} {found[code]:>5} {missed:>6} {wrong[code]:>5} "
            f"{elsewhere[code]:>9}  {CHECKS[code].title}"
        )
    print(
        f"{len(sick)} sick models: {found.total()} found, {len(sick) - found.total()} missed; {len(healthy)} "
        f"healthy ones: {sum(p.startswith('wrong') for p in problems)} findings above a note "
        f"({time.perf_counter() - start:.0f} s, 1 thread)"
    )
    print(*problems, sep="\n", end="\n" * bool(problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
