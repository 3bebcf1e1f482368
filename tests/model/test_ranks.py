"""Ranks: how they are called, who has something else, and what differs."""

import pytest

from batchnorm.model.ranks import ALONE, apart, first_difference, said


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


def test_what_differs_first() -> None:
    one = {"a": (2,), "b": (3, 1)}
    words = "rank 5 from ranks 1 and 2: rank 1 has b of shape (3, 1) where rank 5 has "
    assert first_difference([1, 2, 5], [one, one, {"a": (2,), "b": (4, 1)}]) == words + "b of shape (4, 1)"
    assert first_difference([1, 2, 5], [one, one, {"a": (2,)}]) == words + "nothing more"


def test_one_process_raises_its_own_error() -> None:
    def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        ALONE.together(work)
    assert ALONE.together(lambda: 3) == [3]
