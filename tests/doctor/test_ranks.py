"""Ranks: how they are called, who has something else, whose batches come first, whose findings they are."""

from dataclasses import replace

import pytest

from batchnorm.doctor.contents import Contents, in_order, shuffled
from batchnorm.doctor.finding import Finding, merged_findings
from batchnorm.model.ranks import ALONE, apart, said

A = Finding("BN101", "warning", "bn1", "a", {"n": 1}, "why", "fix")
B = replace(A, code="BN102", layer=None)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([3], "rank 3"),
        ([0, 2], "ranks 0 and 2"),
        ([0, 1, 2, 3], "ranks 0, 1, 2 and 3"),
        (list(range(64)), "ranks 0, 1, 2, 3 and 60 more"),
    ],
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert said(ranks) == words


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("aab", "rank 7 from ranks 1 and 4"),
        ("baa", "rank 1 from ranks 4 and 7"),
        ("abc", "each of ranks 1, 4 and 7 from the others"),
        ("ab", "rank 4 from rank 1"),
        ("aabc", "rank 7, rank 9 from ranks 1 and 4"),
    ],
)
def test_who_is_apart(what: str, words: str) -> None:
    assert apart([1, 4, 7, 9][: len(what)], what) == words


def test_batches_that_were_dealt_out_are_in_order_again() -> None:
    batches = [Contents(n, None) for n in range(7)]
    of_ranks = [batches[0::3], batches[1::3], batches[2::3]]
    order = in_order(of_ranks)
    assert [of_ranks[place][number] for place, number in order] == batches
    assert in_order([[], batches[:2], batches[2:3]]) == [(1, 0), (2, 0), (1, 1)]


def test_batches_are_shuffled_up_to_a_number_of_samples() -> None:
    assert shuffled([Contents(1024, None)] * 8) == 4
    assert shuffled([Contents(5000, None)] * 8) == 2
    assert shuffled([Contents(4, None)] * 8) == 8


def test_findings_of_all_ranks_once() -> None:
    assert merged_findings([[A, B], [A, B]], [0, 1]) == [A, B]
    assert merged_findings([[A, A], [A, A]], [0, 1]) == [A, A]  # two of one layer
    grave = replace(A, severity="error", what="worse")
    assert merged_findings([[A], [grave]], [0, 1]) == [grave]
    (one,) = merged_findings([[], [A], []], [0, 5, 6])
    assert (one.what, one.evidence) == ("a (on rank 5 alone)", {"n": 1, "ranks": "rank 5"})


def test_one_process_raises_its_own_error() -> None:
    def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        ALONE.together(work)
    assert ALONE.together(lambda: 3) == [3]
