"""Word error rate: how many words of a transcript are wrong, missing or too many, of the words that were said."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_APOSTROPHES = re.compile("[\u2018\u2019\u02bc]")
_BESIDE_WORDS = re.compile(r"[^\w\s']|_|(?<!\w)'|'(?!\w)")


def words(text: str) -> list[str]:
    """The words of a text, small, without punctuation. Digits stay as they are: "2" is not "two"."""
    plain = _APOSTROPHES.sub("'", unicodedata.normalize("NFKC", text)).casefold()
    return _BESIDE_WORDS.sub(" ", plain).split()


def distance(said: Sequence[str], wanted: Sequence[str]) -> int:
    """The fewest words to change, to leave out and to put in that make one of the other (Levenshtein)."""
    row = list(range(len(wanted) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def word_errors(said: str, answers: Sequence[str]) -> tuple[int, int]:
    """(errors, words) of a transcript against the accepted answer that it is nearest to."""
    spoken = words(said)
    counted = [(distance(spoken, wanted), len(wanted)) for wanted in map(words, answers)]
    return min(counted, key=lambda pair: (pair[0] / max(1, pair[1]), pair))
