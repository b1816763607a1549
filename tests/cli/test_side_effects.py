"""A result does not hang on a side effect: a bundle that cannot be written, a reader that has gone, links of the hub's cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli_runner import edgewright, passed
from helpers.hub_cache import in_the_hubs_cache
from helpers.tiny import write_tiny_llama
from helpers.vocabularies import letters

pytestmark = pytest.mark.exports


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("side")
    model = letters(write_tiny_llama(folder / "model", num_hidden_layers=1))
    passed(edgewright("export", "-m", model, "--against", "none", "-o", folder / "bundle"))
    return folder / "bundle"


@pytest.fixture
def unwritable(bundle: Path, tmp_path: Path) -> Path:
    """A copy in which no report can be written, whoever asks."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    shutil.rmtree(copy / "reports")
    (copy / "reports").write_text("no folder")
    return copy


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def test_the_result_of_a_bundle_that_cannot_be_written(unwritable: Path) -> None:
    before = tree(unwritable)
    result = edgewright("verify", unwritable, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["passed"] is True
    assert "the report is not kept: " in result.stderr
    result = edgewright("profile", unwritable, "-p", 8, "-n", 4, "-r", 1, "-o", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["targets"]
    assert "the report is not kept: " in result.stderr
    passed(edgewright("run", unwritable, "--prompt", "k n", "--max-new-tokens", 2))
    passed(edgewright("inspect", unwritable))
    assert tree(unwritable) == before


def test_a_failed_verification_is_one_where_its_report_cannot_be_written(unwritable: Path) -> None:
    weights = next(p for p in (unwritable / "onnx").iterdir() if p.is_file())
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = edgewright("verify", unwritable)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("verification failed: ")


@pytest.mark.slow
def test_the_report_is_kept_where_the_reader_has_gone(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    shutil.rmtree(copy / "reports")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "edgewright.cli", "verify", str(copy)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert done.returncode == 2
    assert "has gone" in done.stderr.splitlines()[-1]
    assert json.loads((copy / "reports" / "verify.json").read_text())["passed"] is True


def test_a_snapshot_of_the_hubs_cache_opens_runs_and_verifies(bundle: Path, tmp_path: Path) -> None:
    snapshot = in_the_hubs_cache(bundle, tmp_path / "cache")
    assert all(p.is_symlink() for p in snapshot.rglob("*") if p.is_file())
    answer = passed(edgewright("run", bundle, "--prompt", "k n", "--max-new-tokens", 3))
    assert passed(edgewright("run", snapshot, "--prompt", "k n", "--max-new-tokens", 3)) == answer
    passed(edgewright("verify", snapshot))
    passed(edgewright("profile", snapshot, "-p", 8, "-n", 4, "-r", 1))
