"""Word error rate: words, and the errors between two texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewright.verification.words import distance, word_errors, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Hello, World!", ["hello", "world"]),
        ("don\u2019t 'quote' it's", ["don't", "quote", "it's"]),
        ("well-known  10%\nof_it", ["well", "known", "10", "of", "it"]),
        ("STRASSE Stra\u00dfe", ["strasse", "strasse"]),
        ("\ufb01ne", ["fine"]),
        ("...", []),
    ],
)
def test_words_are_small_and_without_punctuation(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("said", "wanted", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a x c", "a b c", 1),
        ("a c", "a b c", 1),
        ("a b b c", "a b c", 1),
        ("", "a b c", 3),
        ("a b c", "", 3),
        ("b c a", "a b c", 2),
    ],
)
def test_errors_are_the_fewest_changes(said: str, wanted: str, errors: int) -> None:
    assert distance(said.split(), wanted.split()) == errors


_TEXTS = st.lists(st.sampled_from("abc"), max_size=7)


@given(one=_TEXTS, other=_TEXTS, third=_TEXTS)
def test_the_distance_is_a_metric(one: list[str], other: list[str], third: list[str]) -> None:
    assert (distance(one, other) == 0) == (one == other)
    assert distance(one, other) == distance(other, one)
    assert distance(one, third) <= distance(one, other) + distance(other, third)
    assert distance(one, other) <= max(len(one), len(other))


def test_the_nearest_answer_counts() -> None:
    assert word_errors("The cat sat.", ["a dog sat there", "the cat sat"]) == (0, 3)
    assert word_errors("the cat", ["a cat", "the cat sat on"]) == (1, 2)
