"""One tiny bundle for all tests of measuring, and a copy of it for those that leave reports in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.requests import asking
from helpers.tiny import write_tiny_llama

from edgewright.compiler import export


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    model = write_tiny_llama(folder / "model")
    return export(asking(str(model), bits=6.0, importance="zd", max_context=48), folder / "bundle").path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(exported, copy)
    return copy
