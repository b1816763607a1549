"""`compare`: rows from manifests and reports, reports that strangers wrote, and what no report says."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.cli_runner import edgewright, passed, refused

pytestmark = pytest.mark.exports


@pytest.fixture(scope="module")
def bundles(
    tiny_bundle: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """One that is verified and profiled, and one of which nothing is known."""
    folder = tmp_path_factory.mktemp("compare")
    model, known = tiny_bundle("llama")
    shutil.copytree(known, folder / "known")
    shutil.copytree(known, folder / "unknown")
    assert edgewright("verify", folder / "known", "-m", model).exit_code == 0
    assert edgewright("profile", folder / "known", "-p", 4, "-n", 2, "-r", 1, "-o", "json").exit_code == 0
    return folder / "known", folder / "unknown"


@pytest.mark.slow
def test_rows_say_what_the_reports_say(bundles: tuple[Path, Path]) -> None:
    known, unknown = json.loads(passed(edgewright("compare", *bundles, "-o", "json")))
    report = json.loads((bundles[0] / "reports" / "verify.json").read_text())
    measured = json.loads((bundles[0] / "reports" / "profile.json").read_text())["targets"]["onnx"]
    assert known["verified"] is True
    assert known["quantization"]["mean_kl"] == report["quantization"]["mean_kl"] > 0
    assert known["speed"] == {row["test"]: row["median"] for row in measured["rows"]}
    assert known["speed_kind"] == measured["kind"]
    assert sum(known["placement"].values()) > 0
    assert (unknown["verified"], unknown["speed"], unknown["quantization"]) == (None, {}, None)
    assert known["weight_bytes"] == unknown["weight_bytes"] < known["file_bytes"]


@pytest.mark.slow
def test_as_text_and_as_csv(bundles: tuple[Path, Path]) -> None:
    text = passed(edgewright("compare", *bundles))
    assert "not verified: 'edgewright verify" in text
    assert "pp4 tokens/s" in text
    rows = list(csv.DictReader(passed(edgewright("compare", *bundles, "-o", "csv")).splitlines()))
    assert [row["verified"] for row in rows] == ["True", ""]
    assert float(rows[0]["tg2"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("verify", {"targets": 3}, "targets: "),
        ("verify", {}, "run 'verify' again"),
        ("profile", {"targets": {"onnx": {"rows": [{"test": "a", "median": "fast"}]}}}, "run 'profile' again"),
        ("profile", [], "an object is needed"),
    ],
)
def test_a_damaged_report(bundles: tuple[Path, Path], tmp_path: Path, name: str, content: Any, line: str) -> None:
    copy = Path(shutil.copytree(bundles[1], tmp_path / "copy"))
    (copy / "reports").mkdir(exist_ok=True)
    (copy / "reports" / f"{name}.json").write_text(json.dumps(content))
    assert line in refused(edgewright("compare", copy))


def test_what_is_no_bundle(tmp_path: Path) -> None:
    assert "not a bundle" in refused(edgewright("compare", tmp_path))
