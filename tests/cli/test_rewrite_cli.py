"""`edgewright rewrite`: one checkpoint becomes another that exports, or one line says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import tiny

from edgewright.checkpoints.opening import open_checkpoint
from edgewright.cli import main
from edgewright.models.registry import build

EXAMPLE = tiny.EXAMPLE


def edgewright(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.slow
def test_eugen_blocks_are_fitted_and_the_checkpoint_exports(tmp_path: Path) -> None:
    model = tiny.write_tiny_t5gemma(tmp_path / "model")
    words = tmp_path / "words.tsv"
    words.write_text("".join((EXAMPLE / "task.tsv").read_text().splitlines(keepends=True)[:64]))
    out = tmp_path / "rewritten"
    spec = r"encoder\.layers\.0\.mlp:m=32,k=2"
    result = edgewright("rewrite", "-m", model, "--eugen", spec, "--calibration", words, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [layer["path"] for layer in report["layers"]] == ["model.encoder.layers.0.mlp"]
    assert 0 < report["layers"][0]["fit"]["error"] < 1
    before, after = report["layers"][0]["parameters"]
    assert after < before
    exported = edgewright("export", "-m", out, "--bits", "6", "-o", tmp_path / "bundle")
    assert exported.exit_code == 0, exported.stderr
    shown = edgewright("rewrite", "-m", model, "--eugen", spec, "--calibration", words, "-o", tmp_path / "again")
    assert "error on held-out rows" in shown.stdout
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_decoder_only_gemma_becomes_an_encoder_decoder(tmp_path: Path) -> None:
    model = tiny.write_tiny_gemma3(tmp_path / "model")
    result = edgewright("rewrite", "-m", model, "--adapt", "-o", tmp_path / "adapted")
    assert result.exit_code == 0, result.stderr
    assert "t5gemma2" in result.stdout
    adapted = open_checkpoint(str(tmp_path / "adapted"))
    assert [g.name for g in build(adapted.config).graphs()] == ["encoder", "cross_kv", "decoder"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "say what to change"),
        (["--adapt", "--eugen", "mlp:m=32,k=2"], "one of them"),
        (["--adapt", "--calibration", "x.txt"], "--adapt reads no text"),
        (["--eugen", "mlp:m=32,k=2"], "give --calibration"),
        (["--eugen", "mlp:m=32,k=2", "--decoder", "x"], "--decoder is for --adapt"),
        (["--eugen", "mlp", "--calibration", "x.txt"], "is not 'regex:m="),
    ],
)
def test_refusals(options: list[str], words: str, tmp_path: Path) -> None:
    model = tiny.write_tiny_gemma3(tmp_path / "model")
    result = edgewright("rewrite", "-m", model, *options, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
