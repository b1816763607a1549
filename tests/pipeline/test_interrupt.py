"""An export that ends early keeps its finished targets, says so, and the same command goes on from there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.requests import asking
from helpers.tiny import write_tiny_llama

from edgewright.compiler import export
from edgewright.errors import UserError
from edgewright.exporters.artefact import Artefact
from edgewright.pipeline import write_bundle
from edgewright.pipeline.request import Request

FORMATS = ("onnx", "executorch", "coreml")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Lowering:
    """In place of `lower_apart`: writes one small file, and raises `error` at the target `fails`."""

    def __init__(self, fails: str | None = None, error: BaseException | None = None) -> None:
        self.fails, self.error = fails, error
        self.lowered: list[str] = []

    def __call__(self, name: str, checkpoint: Path, folder: Path, *_: Any) -> Artefact:
        (folder / "half.bin").write_bytes(b"half")
        if name == self.fails:
            assert self.error is not None
            raise self.error
        (folder / "half.bin").rename(folder / "weights.bin")
        self.lowered.append(name)
        return Artefact(("weights.bin",), {"decoder": {"op": 1}})


@pytest.fixture
def request_of_three(tmp_path: Path) -> Request:
    model = write_tiny_llama(tmp_path / "model")
    return asking(str(model), FORMATS, bits=6.0, importance="uniform", max_context=32, verify=False)


def run(request: Request, output: Path, lowering: Lowering, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the export said."""
    lines: list[str] = []
    monkeypatch.setattr(write_bundle, "lower_apart", lowering)
    export(request, output, lines.append)
    return lines


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), FULL], ids=["ctrl-c", "sigterm", "full disk"])
def test_finished_targets_outlive_an_interrupt(
    request_of_three: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    output = tmp_path / "bundle"
    raised = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised) as caught:
        run(request_of_three, output, Lowering("coreml", error), monkeypatch)
    (kept,) = tmp_path.glob(".bundle.*.partial")
    assert caught.value.__notes__ == [f"what is done is kept in {kept}: the same command goes on from there"]
    assert not output.exists()

    again = Lowering()
    lines = run(request_of_three, output, again, monkeypatch)
    assert again.lowered == ["coreml"]
    assert {"onnx: lowered already", "executorch: lowered already"} <= set(lines)
    assert f"going on with the unfinished run in {kept}" in lines
    assert not kept.exists()
    assert sorted(p.name for p in (output / "coreml").iterdir()) == ["weights.bin"]

    whole = tmp_path / "whole"
    run(request_of_three, whole, Lowering(), monkeypatch)
    assert (whole / "manifest.json").read_text() == (output / "manifest.json").read_text()


def test_an_interrupt_before_the_first_target_leaves_nothing(
    request_of_three: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        run(request_of_three, tmp_path / "bundle", Lowering("onnx", KeyboardInterrupt()), monkeypatch)
    assert not hasattr(caught.value, "__notes__")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
