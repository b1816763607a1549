"""Axes of the page: places and the marks that a person reads."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewright.reports.page.axes import Axis, linear, logarithmic, short

POSITIVE = st.floats(1e-9, 1e15, allow_nan=False)


@given(st.lists(POSITIVE, min_size=1, max_size=6))
def test_every_value_and_every_mark_is_on_the_axis(values: list[float]) -> None:
    for axis in (linear("x", values), logarithmic("x", values)):
        places = [axis.at(v) for v in values]
        assert all(0 <= place <= 100 for place in places)
        assert sorted(range(len(values)), key=lambda i: (values[i], i)) == sorted(
            range(len(values)), key=lambda i: (places[i], values[i], i)
        )
        marks = axis.marks
        assert len(marks) <= 12
        assert all(0 <= at <= 100 for at, _ in marks)
        assert [at for at, _ in marks] == sorted(at for at, _ in marks)


@given(st.lists(POSITIVE, min_size=1, max_size=6))
def test_an_axis_has_marks(values: list[float]) -> None:
    assert len(linear("x", values).marks) >= 4
    low, high = logarithmic("x", values).low, logarithmic("x", values).high
    if math.log10(high / low) > 1:
        assert logarithmic("x", values).marks


def test_a_logarithmic_axis() -> None:
    axis = Axis("x", 1.0, 100.0, log=True)
    assert [axis.at(v) for v in (0.1, 1.0, 10.0, 100.0, 1e9)] == [0.0, 0.0, 50.0, 100.0, 100.0]
    assert [text for _, text in axis.marks] == ["1", "2", "5", "10", "20", "50", "100"]


def test_without_values() -> None:
    assert linear("x", []).at(0.0) == 0.0
    assert logarithmic("x", [0.0, math.inf]).at(1.0) > 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (1234.0, "1.23k"), (2.5e9, "2.5G"), (3e12, "3T"), (0.25, "0.25"), (1e-5, "1.0e-05")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text
