"""Every planted fault is found in its layer, and nothing above a note in healthy models."""

import pytest

import batchnorm as bn
from batchnorm.doctor.report import Report
from tests.doctor import corpus, corpus_heldout
from tests.doctor.data.digits import Make

SICK = [*corpus.SICK, *corpus_heldout.SICK]
HEALTHY = [*corpus.HEALTHY, *corpus_heldout.HEALTHY]


def diagnosed(make: Make) -> Report:
    model, batches, options = make()
    return bn.diagnose(model, batches or None, **options)


@pytest.mark.parametrize(
    ("make", "code", "layer"), [case[1:] for case in SICK], ids=[case[0] for case in SICK]
)
def test_the_fault_is_found(make: Make, code: str, layer: str | None) -> None:
    found = [f for f in diagnosed(make).findings if f.code == code and f.layer == layer]
    assert len(found) == 1
    assert found[0].severity != "note" or code == "BN101"
    assert found[0].evidence


@pytest.mark.parametrize("make", [case[1] for case in HEALTHY], ids=[case[0] for case in HEALTHY])
def test_a_healthy_model_is_healthy(make: Make) -> None:
    assert [(f.code, f.layer, f.what) for f in diagnosed(make).findings if f.severity != "note"] == []


@pytest.mark.parametrize("table", [corpus.SICK, corpus.HEALTHY, corpus_heldout.SICK, corpus_heldout.HEALTHY])
def test_a_corpus_is_large_and_its_names_are_its_own(table: list[tuple[object, ...]]) -> None:
    names = [case[0] for case in table]
    assert len(set(names)) == len(names)
    assert len(names) >= 30


def test_every_code_has_a_fault_in_the_corpus() -> None:
    from batchnorm.doctor.check import CHECKS

    planted = {case[2] for case in corpus.SICK}
    notes_alone = {"BN119", "BN122"}  # tested in test_static
    assert {code for code, check in CHECKS.items() if not check.needs_data} == planted | notes_alone
