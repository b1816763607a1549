"""Answers as they are written: stop strings across pieces, stop tokens, why an answer ended, and how long it is."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewright.errors import UserError
from edgewright.runtimes.answer import Answer, Stops
from edgewright.runtimes.generate import Ending


class Letters:
    """A `DecodeStream` in which a token is a letter, shown one token late."""

    def __init__(self) -> None:
        self.held = ""

    def put(self, token: int) -> str:
        before, self.held = self.held, chr(token)
        return before

    def end(self) -> str:
        return self.held


def tokens(text: str, ending: Ending = "end") -> Generator[int, None, Ending]:
    yield from map(ord, text)
    return ending


def answer(text: str, stops: Sequence[str] = (), ids: Sequence[int] = (), ending: Ending = "end") -> Answer:
    stream: Any = Letters()
    return Answer(tokens(text, ending), stream, Stops(tuple(stops), frozenset(ids)), 7)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_stop_string_that_is_whole_first(text: str, stops: list[str]) -> None:
    said = answer(text, stops)
    written = "".join(said)
    seen = [text[:n] for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)]
    first = min((seen[0].find(stop) for stop in stops if stop in seen[0]), default=None) if seen else None
    assert written == text[:first]
    assert said.reason == ("end" if first is None else "stop")


def test_pieces_come_as_soon_as_they_can_be_no_stop_string() -> None:
    assert list(answer("one STOP", ["STOP"])) == ["o", "n", "e", " "]
    assert list(answer("one SToP", ["STOP"])) == ["o", "n", "e", " ", "STo", "P"]


def test_a_stop_token_is_not_written() -> None:
    said = answer("abcd", ids=[ord("c")])
    assert "".join(said) == "ab"
    assert (said.reason, said.ids) == ("stop", [ord("a"), ord("b")])


@pytest.mark.parametrize("ending", ["end", "limit", "context"])
def test_why_it_ended(ending: Ending) -> None:
    said = answer("ab", ending=ending)
    assert said.reason == "unfinished"
    assert "".join(said) == "ab"
    assert (said.reason, len(said.ids), said.prompt_tokens) == (ending, 2, 7)
    assert said.rate > 0


def test_an_answer_that_is_left_ends_the_generation() -> None:
    closed = []

    def endless() -> Generator[int, None, Ending]:
        try:
            while True:
                yield 65
        finally:
            closed.append(True)

    stream: Any = Letters()
    said = Answer(endless(), stream)
    assert [next(said) for _ in range(3)] == ["A", "A", "A"]
    said.close()
    assert closed == [True]
    assert said.reason == "unfinished"


@pytest.mark.parametrize("strings", [("",), ("x" * 5000,), tuple("a" * 65)])
def test_stop_strings_are_bounded(strings: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="--stop"):
        Stops(strings)
