"""Batches and findings of several ranks: whose come first, and who found what."""

from dataclasses import replace

from batchnorm.doctor.contents import Contents, in_order, shuffled
from batchnorm.doctor.finding import Finding, merged_findings

A = Finding("BN101", "warning", "bn1", "a", {"n": 1}, "why", "fix")
B = replace(A, code="BN102", layer=None)


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
