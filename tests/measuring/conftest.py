"""One tiny bundle for all tests of measuring, and a copy of it for those that leave reports in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def exported(tiny_bundle: Callable[[str], tuple[Path, Path]]) -> Path:
    return tiny_bundle("llama")[1]


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(exported, copy)
    return copy
