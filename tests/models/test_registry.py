"""A family is whole: a file with a `Model` and a line in the table."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from edgewright.models.language_model import LanguageModel
from edgewright.models.registry import ARCHITECTURES

FAMILIES = Path(__file__).parent.parent.parent / "models" / "families"


def test_a_file_with_a_model_has_a_line() -> None:
    listed = {module.removeprefix("families.") for module in ARCHITECTURES.values()}
    files = {path.stem for path in FAMILIES.glob("*.py") if "\nclass Model(" in path.read_text()}
    assert files <= listed, f"models/registry.py has no line for {files - listed}"


@pytest.mark.parametrize("module", sorted(set(ARCHITECTURES.values())))
def test_a_line_leads_to_a_model(module: str) -> None:
    assert issubclass(importlib.import_module(f"edgewright.models.{module}").Model, LanguageModel)
