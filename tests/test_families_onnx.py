"""Every family through ONNX Runtime, and the table in the docs complete."""

from __future__ import annotations

from pathlib import Path

import families
import pytest

from edgewright.models import ARCHITECTURES


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("family", families.NAMES)
def test_a_family_through_onnx(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = families.verified(family, "onnx", tmp_path, monkeypatch)
    assert report.passed
    assert report.targets[0].lowering.max_relative_error <= 1e-4
    assert families.documented()[family, "onnx"] == families.cell(report)


def test_the_table_has_every_architecture_and_target() -> None:
    assert set(families.NAMES) == set(ARCHITECTURES)
    assert set(families.documented()) == {(f, t) for f in families.NAMES for t in families.FORMATS}
    assert families.table(families.documented()) in families.DOCS.read_text()
