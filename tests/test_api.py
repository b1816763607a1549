"""The public API: lazy, typed, documented, and its page runs as it stands."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import edgewright

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text()


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, edgewright; edgewright.UserError; print([m for m in ('torch', 'numpy', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PUBLIC = [name for name in edgewright.__all__ if not name.startswith("__")]


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert edgewright.__version__ == project["version"]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(edgewright, name)
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"
    if inspect.isfunction(value):
        hints = inspect.get_annotations(value)
        assert hints.keys() >= {*inspect.signature(value).parameters, "return"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'exports'"):
        edgewright.exports  # noqa: B018


def test_the_page_names_every_function() -> None:
    functions = [name for name in PUBLIC if name[0].islower()]
    assert [name for name in functions if f"ew.{name}(" not in PAGE] == []


@pytest.mark.slow
@pytest.mark.exports
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    exec("\n".join(blocks), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert "N AY T\n" in printed
    assert "onnx passed" in printed
    assert re.search(r"^pp16 \d+ tokens/s$", printed, re.MULTILINE)
    assert (tmp_path / "plan.json").is_file()
