"""Every family through ONNX Runtime, and the table in the docs complete."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import family_table

from edgewright.models.registry import ARCHITECTURES

pytestmark = pytest.mark.exports


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))


QUICK = ("module",)
"""The others through ONNX are slow tests; hybrids have fast ones in tests/exporters/onnx/test_recurrent_onnx.py."""


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in family_table.NAMES],
)
def test_a_family_through_onnx(family: str, tmp_path: Path) -> None:
    report = family_table.verified(family, "onnx", tmp_path)
    assert report.passed
    assert report.targets[0].lowering.max_relative_error <= 1e-4
    assert family_table.documented()[family, "onnx"] == family_table.cell(report)


def test_the_table_has_every_architecture_and_target() -> None:
    listed = {name.partition(" ")[0] for name in family_table.NAMES}
    assert listed == set(ARCHITECTURES)
    assert set(family_table.documented()) == {(f, t) for f in family_table.NAMES for t in family_table.FORMATS}
    assert family_table.table(family_table.documented()) in family_table.DOCS.read_text()
