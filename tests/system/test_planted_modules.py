"""Modules that lie in the current folder are not run: by the command line, by its children, by their children."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import write_tiny_llama

from edgewright.targets.registry import TARGETS

PLANTED = (
    *("torch", "numpy", "click", "json", "typing", "tempfile", "safetensors", "tokenizers", "pydantic", "joblib"),
    *("onnx", "onnxruntime", "executorch", "coremltools", "tensorrt", "flatbuffers", "scipy", "jinja2", "matplotlib"),
    *("sitecustomize", "usercustomize", "_distutils_hack", "edgewright_planted"),
)
CONSOLE = str(Path(sys.executable).with_name("edgewright"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, and modules that leave a file where they are run."""
    for name in PLANTED:
        text = f"import os\nopen(os.path.join(os.path.dirname(__file__), 'RAN-{name}'), 'w').close()\n"
        (tmp_path / f"{name}.py").write_text(text)
    write_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    return tmp_path


def ran(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("RAN-*"))


def command(folder: Path, *line: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert not ran(folder), line


def test_the_trap_works(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", "import edgewright_planted"], cwd=folder, check=True)
    assert ran(folder) == ["RAN-edgewright_planted"]


@pytest.mark.parametrize("start", [(CONSOLE,), (sys.executable, "-m", "edgewright.cli")], ids=["console", "module"])
def test_the_command_itself(folder: Path, start: tuple[str, ...]) -> None:
    command(folder, *start, "doctor")
    command(folder, *start, "plan", "-m", "model", "--bits", "5")


@pytest.mark.slow
@pytest.mark.exports
def test_children_that_lower_and_score(folder: Path) -> None:
    """Two targets are lowered in a process each; importance is scored in joblib's."""
    targets = [name for name in ("onnx", "executorch") if TARGETS[name].installed]
    formats = [word for name in targets for word in ("--format", name)]
    options = ("--bits", "6", "--importance", "zd", "--workers", "2", "--calibration-tokens", "200", "--no-verify")
    command(folder, CONSOLE, "export", "-m", "model", *formats, *options, "-o", "bundle")


@pytest.mark.slow
@pytest.mark.exports
def test_children_that_verify_and_measure(folder: Path) -> None:
    command(folder, CONSOLE, "export", "-m", "model", "--bits", "6", "--no-verify", "-o", "bundle")
    command(folder, CONSOLE, "verify", "bundle", "-m", "model", "--format", "onnx")
    command(folder, CONSOLE, "profile", "bundle", "--format", "onnx", "-p", "4", "-n", "2", "-r", "1")
