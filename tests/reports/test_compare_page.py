"""The page of several bundles: the frontier, and what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.pages import Page
from hypothesis import given
from hypothesis import strategies as st

from edgewright.reports.page.compare_page import Choice, common_test, compare_html, frontier, frontiers


def _choice(name: str, size: int, loss: float | None, speed: float | None) -> Choice:
    return Choice(name, size, loss, speed)


def test_the_frontier_is_what_nothing_beats() -> None:
    choices = [
        _choice("small", 10, 0.5, 20.0),
        _choice("exact", 40, 0.1, 10.0),
        _choice("beaten", 45, 0.2, 9.0),
        _choice("fast", 40, 0.5, 90.0),
        _choice("same as small", 10, 0.5, 20.0),
    ]
    assert frontier(choices) == [True, True, False, True, True]
    titles = dict(frontiers(choices, "tg8"))
    assert set(titles) == {"Loss against bytes", "Speed against bytes", "Loss against speed"}
    line = next(s for s in titles["Loss against bytes"].series if s.style == "line")
    assert len(line.points) == 2  # small, exact


def test_what_is_not_known_is_not_judged() -> None:
    choices = [_choice("a", 10, None, None), _choice("b", 20, 0.1, None), _choice("c", 30, 0.2, None)]
    assert frontier(choices) == [True, True, False]
    assert [title for title, _ in frontiers(choices, None)] == ["Loss against bytes"]


CHOICES = st.lists(
    st.builds(Choice, st.just("x"), st.integers(1, 9), st.integers(1, 9).map(float), st.integers(1, 9).map(float)),
    min_size=1,
    max_size=8,
)


@given(CHOICES)
def test_each_choice_is_on_the_frontier_or_beaten_by_one_that_is(choices: list[Choice]) -> None:
    best = [c for c, on_it in zip(choices, frontier(choices), strict=True) if on_it]
    assert best
    for c in choices:
        assert any(
            b.bytes <= c.bytes and (b.loss or 0) <= (c.loss or 0) and (b.speed or 0) >= (c.speed or 0) for b in best
        )


def _row(bundle: str, **more: Any) -> dict[str, Any]:
    row = {"bundle": bundle, "model": "m", "model_type": "llama", "bits": 4.5, "target": "onnx", "weight_bytes": 10}
    row |= {"file_bytes": 12, "verified": None, "quantization": None, "placement": None, "task_accuracy": None}
    row |= {"original_task_accuracy": None, "text": None, "speed": {}, "speed_kind": None, "speed_on": None}
    return row | more


@pytest.mark.parametrize("count", [1, 3])
def test_a_page_of_bundles_of_which_little_is_known(count: int) -> None:
    page = Page(compare_html([_row(f"/b/{i}") for i in range(count)]))
    assert page.sections == ["sides", "frontier", "bytes", "speed", "placement", "kinds"]
    assert "no report says its loss" in page.text
    assert "Fewer than two" in page.text


def test_bundles_of_one_name_and_two_machines() -> None:
    loss = {"mean_kl": 0.01, "top1": 0.9}
    shared = {"quantization": loss, "verified": True, "placement": {"accelerated": 3, "host": 0, "fallback": 1}}
    rows = [
        _row(f"/{i}/b", speed={"pp4": 9.0, "tg2": 5.0 + i}, speed_kind="measured", speed_on=f"cpu {i}", **shared)
        for i in range(2)
    ]
    assert common_test(rows) == "tg2"
    page = Page(compare_html(rows))
    assert {"/0/b, onnx", "/1/b, onnx"} <= set(page.cells)
    assert "different machines" in page.text
    assert page.with_class("place-fallback") >= 2
