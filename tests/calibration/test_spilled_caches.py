"""Caches in files: the values are those of the plain runtime, and what is large is no anonymous memory."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.calibration import opened, samples_of
from helpers.family_table import CONFIGS

from edgewright.calibration.forward import CalibrationForward
from edgewright.calibration.spilled_caches import DiskCacheSession, Files, scratch
from edgewright.errors import UserError
from edgewright.models.layers.linear import Linear
from edgewright.runtimes.eager import EagerSession


def test_large_tensors_are_kept_once_and_small_ones_left(tmp_path: Path) -> None:
    files = Files(tmp_path)
    large, small = torch.randn(64, 1024), torch.randn(4)
    kept = files.keep(large.T)
    assert torch.equal(kept, large.T)
    assert files.keep(kept) is kept
    assert files.keep(view := kept.transpose(0, 1)) is view
    assert files.keep(small) is small
    assert torch.equal(files.keep(large > 0), large > 0)
    assert not list(tmp_path.iterdir())  # nameless: nothing to clean up


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells")
def test_no_descriptor_is_held(tmp_path: Path) -> None:
    files = Files(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    kept = [files.keep(torch.full((1 << 15,), float(i))) for i in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before  # 1,024 may be all there are
    assert [float(k[-1]) for k in kept] == list(range(20))


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone cannot hold the caches of the calibration data \(No such file"):
        Files(tmp_path / "gone").keep(torch.zeros(1 << 20))


def test_the_folder_for_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert scratch() == tmp_path
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(os, "access", lambda path, _: path == Path("/var/tmp"))
    assert scratch() == Path("/var/tmp")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert scratch() == Path(tempfile.gettempdir())


@pytest.mark.parametrize("family", CONFIGS)
def test_files_change_nothing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(family, tmp_path)
    if source.generation.task == "module":
        pytest.skip("no caches")
    source = replace(source, samples=samples_of(source.generation), part_tokens=1)
    assert isinstance(CalibrationForward(source.build(), source)._session, DiskCacheSession)  # what runs it otherwise
    kept: list[tuple[int, ...]] = []
    keep = Files.keep

    def counted(self: Files, value: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(value.shape))
        return keep(self, value)

    monkeypatch.setattr(Files, "keep", counted)
    found = []
    for filed in (False, True):
        model = source.build()
        session = DiskCacheSession(model.graphs(), tmp_path, 1) if filed else EagerSession(model.graphs())
        forward = CalibrationForward(model, source, session=session)
        found.append(forward.logits(10**6)[0])
    assert np.array_equal(*found)
    layers = sum(isinstance(m, Linear) for m in model.modules())
    if family in ("llama", "gemma3", "t5gemma", "t5gemma2", "mu"):
        assert len(kept) >= layers / 4  # the keys and values of every layer, at least
