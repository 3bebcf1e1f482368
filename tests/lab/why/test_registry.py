"""Experiments are found by name and number, and say all that the page needs."""

import pytest

from batchnorm.lab.why.registry import NAMES, chosen, experiment


def test_every_experiment_is_under_its_name_and_number() -> None:
    for number, name in NAMES.items():
        found = experiment(name)
        assert (found.number, found.name) == (number, name)


@pytest.mark.parametrize("name", NAMES.values())
def test_every_experiment_says_what_the_page_needs(name: str) -> None:
    found = experiment(name)
    for text in (found.title, found.in_short, found.claim, found.source, found.refuted_by):
        assert len(text) > 10
    assert 0 < found.steps("quick") <= found.steps("full")


def test_names_and_numbers_choose_in_the_pages_order() -> None:
    assert [one.name for one in chosen(["5", "sigmoids", "1"])] == ["sigmoids", "moving_average"]
    assert [one.name for one in chosen([])] == list(NAMES.values())


def test_an_unknown_experiment_is_an_error_that_lists_them() -> None:
    with pytest.raises(ValueError, match=r"no experiment 'magic', '0': expected one of 1 sigmoids, 2 "):
        chosen(["1", "magic", "0"])
