"""The Swift project as files: nothing is left to fill in, a Core ML package comes along, too new a graph is refused."""

from __future__ import annotations

import json
import plistlib
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.apps import project
from helpers.cli_runner import edgewright, passed, refused
from helpers.requests import asking
from helpers.shared import CONTEXT, write_model

from edgewright.apps.contract import App
from edgewright.apps.platforms import PLATFORMS
from edgewright.compiler import export
from edgewright.errors import VerificationFailure
from edgewright.system.hashes import of_file

MODEL = PLATFORMS["swift"].model


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as ONNX and as Core ML."""
    folder = tmp_path_factory.mktemp("both")
    model = str(write_model("llama", folder / "model"))
    request = asking(model, formats=("onnx", "coreml"), bits=6.0, importance="zd", max_context=CONTEXT, verify=False)
    return export(request, folder / "bundle").path


@pytest.fixture(scope="module")
def made(both: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swift") / "app"
    project(both, folder, "swift")
    return folder


@pytest.fixture(scope="module")
def plain(app_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of a bundle without Core ML."""
    folder = tmp_path_factory.mktemp("plain") / "app"
    project(app_bundles("llama"), folder, "swift", name="app")
    return folder


def contract(folder: Path) -> App:
    return App.model_validate(json.loads((folder / MODEL / "app.json").read_text()))


def test_nothing_is_left_to_fill_in(plain: Path) -> None:
    sources = [p for p in plain.rglob("*") if p.suffix in (".swift", ".md", ".yml", ".h", ".c")]
    assert len(sources) > 25
    for path in sources:
        text = path.read_text()
        assert not any(mark in text for mark in ("{{", "{%", "TODO")), path.name
        assert len(text.splitlines()) <= 400 or path.name == "UnicodeTables.swift", path.name


def test_the_same_bundle_gives_the_same_bytes(app_bundles: Callable[[str], Path], plain: Path) -> None:
    said = edgewright("embed", app_bundles("llama"), "--platform", "swift", "-o", plain, "--name", "app")
    passed(said)
    assert "nothing was written" in said.stderr


@pytest.mark.slow
def test_the_package_comes_along_with_its_hashes(both: Path, made: Path, tmp_path: Path) -> None:
    app = contract(made)
    assert app.coreml is not None
    assert (app.coreml.package, app.coreml.functions) == ("model.mlpackage", ("decoder", "decoder_step"))
    stored = {
        p.relative_to(made / MODEL).as_posix() for p in (made / MODEL / app.coreml.package).rglob("*") if p.is_file()
    }
    assert stored == set(app.coreml.files)
    for name, fact in app.coreml.files.items():
        path = made / MODEL / name
        assert (of_file(path), path.stat().st_size) == (fact.sha256, fact.bytes)
    assert not stored & set(app.files)
    assert "CoreMLRuntime()" in (made / "README.md").read_text()
    project(both, tmp_path / "cpp", "cpp")
    assert contract(tmp_path / "cpp").coreml is None
    assert not (tmp_path / "cpp" / MODEL / "model.mlpackage").exists()


@pytest.mark.slow
def test_a_damaged_package_is_refused(both: Path, tmp_path: Path) -> None:
    program = next((both / "coreml").rglob("*.mlmodel"))
    whole = program.read_bytes()
    program.write_bytes(whole[:-1] + b"\xff")
    with pytest.raises(VerificationFailure, match="mlmodel"):
        project(both, tmp_path / "out", "swift")
    program.write_bytes(whole)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_a_package_says_how_to_get_one(plain: Path) -> None:
    assert contract(plain).coreml is None
    assert "export with `--format onnx --format coreml`" in (plain / "README.md").read_text()


def test_a_graph_that_is_too_new_is_refused(app_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    line = refused(edgewright("embed", app_bundles("t5gemma"), "--platform", "swift", "-o", tmp_path / "app"))
    assert f"--onnxruntime {PLATFORMS['swift'].runtime}" in line
    assert list(tmp_path.iterdir()) == []


def test_the_entitlement_is_the_one_for_memory(plain: Path) -> None:
    entitlements = plistlib.loads((plain / "App" / "Sample.entitlements").read_bytes())
    assert entitlements == {"com.apple.developer.kernel.increased-memory-limit": True}
    spec = (plain / "App" / "project.yml").read_text()
    assert "Sample.entitlements" in spec
    assert "../model" in spec
