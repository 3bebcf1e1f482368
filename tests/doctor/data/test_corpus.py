"""The corpus: every planted fault is found with its code and layer, and no healthy model is called sick."""

import pytest

from tests.doctor.corpus_data import HEALTHY, SICK
from tests.doctor.data.digits import Make, examine


@pytest.mark.parametrize(("make", "code", "layer"), [pytest.param(*case[1:], id=case[0]) for case in SICK])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_planted_fault_is_found(make: Make, code: str, layer: str | None) -> None:
    found = [finding for finding in examine(make()) if finding.severity != "note"]
    assert (code, layer) in [(finding.code, finding.layer) for finding in found]
    for finding in found:
        if finding.code != "BN200":
            assert {"effect", "standard_error", "noise_alone"} <= finding.evidence.keys(), finding


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in HEALTHY])
def test_a_healthy_model_is_healthy(make: Make) -> None:
    found = [finding for finding in examine(make()) if finding.severity != "note"]
    assert not found, [f"{finding.code} {finding.layer}: {finding.what}" for finding in found]


def test_the_corpus_is_as_large_as_is_said() -> None:
    assert len(SICK) >= 20
    assert len(HEALTHY) >= 30
    assert len({code for _, _, code, _ in SICK}) == 18  # every code but those of several processes
