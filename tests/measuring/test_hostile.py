"""A device and a bundle of strangers: what they say is bounded, and nothing is written outside of the bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import Page
from pydantic import ValidationError

from edgewright.commands.profile import ProfileLengths
from edgewright.commands.profile_devices import profile_devices
from edgewright.errors import UserError
from edgewright.measuring.device import last_record, record_of
from edgewright.measuring.measure import DeviceResult, MeasuredRow, Settings
from edgewright.reports.measured import measured_text
from edgewright.reports.page.bundle_page import bundle_html

ROW: dict[str, Any] = {"record": "row", "test": "pp8", "kind": "prefill", "figure": "measured", "rate": 2.0, "n": 1}
STATE = {"clocks": "not measured", "celsius": {"cpu": 40.0}, "throttling": "not measured"}


def test_a_row_is_taken() -> None:
    row = MeasuredRow.model_validate({**ROW, "before": STATE, "more": "is left out"})
    assert row.before is not None
    assert row.before.celsius == {"cpu": 40.0}


@pytest.mark.parametrize(
    "change",
    [
        {"rate": float("nan")},
        {"rate": float("inf")},
        {"rate": -1.0},
        {"rate": 10**400},
        {"rate": "fast"},
        {"test": "x" * 500},
        {"figure": "guessed"},
        {"n": -1},
        {"memory": {"peak_resident": 10**400}},
        {"before": {**STATE, "celsius": {"cpu": 10**400}}},
        {"before": {**STATE, "clocks": [{"mhz": 1e300}]}},
        {"after": {**STATE, "throttling": "x" * 500}},
        {"energy": [{"source": "a", "boundary": "b", "joules": float("nan")}]},
        {"answer": [10**5] * (1 << 17)},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_row_out_of_bounds_is_not(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MeasuredRow.model_validate({**ROW, **change})


@pytest.mark.parametrize("line", ["", "[]", "7", "{", "[" * 100_000, '{"record": 1' + "0" * 5000 + "}", "\xff"])
def test_a_line_that_is_no_record(line: str) -> None:
    assert record_of(line.encode("latin-1")) == {}
    assert last_record(f'{{"record": "about"}}\n{line}\n') == {"record": "about"}


LENGTHS = ProfileLengths(prompts=(8, 16), new=0, repeats=2)
SETTINGS = Settings(threads=1, python=sys.executable, cool_within=0.0)


class Unplugged(Exception):
    """The end of a run."""


def leave_early(bundle: Path, url: str) -> Path:
    """A run that ends after its first row; returns what the bundle keeps of it."""

    def note(text: str) -> None:
        if text.startswith("pp8:"):
            raise Unplugged

    with pytest.raises(Unplugged):
        list(profile_devices(bundle, [url], LENGTHS, SETTINGS, note))
    (kept,) = (bundle / "reports").glob("rows-*.jsonl")
    return kept


def finish(bundle: Path, url: str) -> DeviceResult:
    (result,) = profile_devices(bundle, [url], LENGTHS, SETTINGS)
    assert [row.test for row in result.rows] == ["pp8", "pp16", "answer"]
    return result


@pytest.mark.exports
def test_what_the_bundle_keeps_may_be_anything(bundle: Path, tmp_path: Path) -> None:
    url = f"local://{tmp_path / 'device'}"
    kept = leave_early(bundle, url)
    kept.write_text('no json\n[]\n{"record": "end"}\n{"record": "dance"}\n{"record": "row", "test": "cut of')
    finish(bundle, url)
    kept = leave_early(bundle, url)
    kept.write_text(json.dumps({**ROW, "rate": -1}) + "\n")
    with pytest.raises(UserError, match=r"a row's rate: .*; measure again with --no-resume"):
        finish(bundle, url)


@pytest.mark.exports
def test_nothing_is_written_through_a_link(bundle: Path, tmp_path: Path) -> None:
    url, outside = f"local://{tmp_path / 'device'}", tmp_path / "outside"
    outside.write_text("mine\n")
    kept = leave_early(bundle, url)
    kept.unlink()
    kept.symlink_to(outside)
    finish(bundle, url)
    assert outside.read_text() == "mine\n"


@pytest.mark.exports
def test_what_is_printed_of_a_device(bundle: Path, tmp_path: Path) -> None:
    result = finish(bundle, f"local://{tmp_path / 'device'}")
    row = result.rows[0].model_copy(update={"energy": (), "before": None, "test": "pp8|<b>", "memory": "not measured"})
    odd = result.model_copy(update={"rows": (row,), "not_measured": {"tg9": "it was killed"}, "answer_here": None})
    for output_format in ("md", "csv", "json"):
        text = measured_text([result, odd], output_format)
        assert "pp16" in text
    assert "it was killed" in measured_text([odd], "md")
    page = Page(bundle_html(bundle, linked=[result, odd]))
    assert "pp8|<b>" in page.cells
    assert page.with_class("k-measured") > 2
    head, *lines = measured_text([result], "csv").splitlines()
    assert head.startswith("device,runtime,figure,test,unit,rate,std,median,repeats")
    assert [line.split(",")[3] for line in lines] == ["pp8", "pp16"]
    assert all(line.split(",")[2] == "measured" for line in lines)
