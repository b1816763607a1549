"""Families through the other targets: some of them always, all of them with `-m slow`, which makes the table in the docs."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from helpers import family_table

from edgewright.errors import UserError, VerificationFailure
from edgewright.targets.registry import TARGETS

pytestmark = pytest.mark.exports


SOME = [
    pytest.param("module", "coreml", marks=pytest.mark.slow),
    pytest.param("dolphin", "executorch", marks=pytest.mark.slow),
    pytest.param("module", "tensorrt", marks=pytest.mark.slow),
    pytest.param("lfm2", "qnn", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))


def found(family: str, form: str, folder: Path) -> str:
    """The cell of the table: yes and the activations it is verified with, or the reason that `export` gives."""
    try:
        report = family_table.verified(family, form, folder)
    except UserError as error:
        return f"no: {str(error).removeprefix(f'--format {form}: ').removesuffix('; leave this target out')}"
    except VerificationFailure as error:
        if "top-1 agreement" not in str(error):
            raise
        return "no: `verify` refuses it, the runtime's arithmetic costs more than 1 % of the best tokens"
    assert report.passed
    return family_table.cell(report)


@pytest.mark.parametrize(("family", "form"), SOME)
def test_a_family_through_a_target(family: str, form: str, tmp_path: Path) -> None:
    if not TARGETS[form].installed:
        pytest.skip(f"{form} is not installed")
    assert found(family, form, tmp_path) == family_table.documented()[family, form]


@pytest.mark.slow
@pytest.mark.parametrize("family", family_table.NAMES)
def test_a_row_of_the_table(family: str, tmp_path: Path) -> None:
    """Prints a family's row; fails where the docs say another thing. `-k NAME` makes one row."""
    cells = {}
    for form in family_table.FORMATS:
        cells[family, form] = found(family, form, tmp_path / form)
        gc.collect()
    print(family_table.row(family, cells))
    assert cells == {key: cell for key, cell in family_table.documented().items() if key[0] == family}
