"""The wheel holds all that the package needs: built from the tracked files, it imports, helps and exports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.tiny import write_tiny_llama

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    apart = ("tests/", "benchmarks/", "docs/", "examples/")
    for name in listed.stdout.decode().split("\0"):
        if name and not name.startswith(apart) and (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def python(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_imports_itself(installed: Path) -> None:
    done = python(installed, "-c", "import edgewright; print(edgewright.__file__)")
    assert done.stdout.strip() == str(installed / "edgewright" / "__init__.py"), done.stderr
    assert not (installed / "edgewright" / "tests").exists()
    assert (installed / "edgewright" / "py.typed").is_file()
    for name in ("default.txt", "held_out.txt", "TEXTS.md"):
        assert (installed / "edgewright" / "calibration" / name).is_file()
    templates = [
        p.relative_to(ROOT)
        for room in ("apps", "reports/page")
        for p in (ROOT / room).rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc")
    ]
    assert len(templates) > 20
    assert [str(name) for name in templates if not (installed / "edgewright" / name).is_file()] == []


def test_it_helps(installed: Path) -> None:
    done = python(installed, "-m", "edgewright.cli", "--help")
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout


@pytest.mark.slow
@pytest.mark.exports
def test_it_exports(installed: Path) -> None:
    model = write_tiny_llama(installed.parent / "model")
    bundle = installed.parent / "bundle"
    options = ("--bits", "6", "--importance", "uniform", "--max-context", "32", "-o", str(bundle))
    done = python(installed, "-m", "edgewright.cli", "export", "-m", str(model), *options)
    assert done.returncode == 0, done.stderr
    assert (bundle / "manifest.json").is_file()
    listed = python(installed, "-m", "edgewright.cli", "devices", "list")
    profiles = {path.stem for path in (ROOT / "device_profiles").glob("*.toml")}
    assert profiles <= {line.split()[0] for line in listed.stdout.splitlines()}, (
        "a device's profile is not in the wheel"
    )
