"""What memory cannot hold is refused before any work, with the figure."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny
from helpers.requests import asking

from edgewright import compiler
from edgewright.errors import UserError
from edgewright.models.registry import build
from edgewright.pipeline.check import context_bytes

LONGEST = 1 << 24


def test_a_context_takes_tables_and_caches() -> None:
    model = build(tiny.LLAMA)
    frequencies, layers, kv_heads, head_dim = 8, 3, 2, 16
    tables = 3 * 2 * 4 * frequencies * 1000
    assert context_bytes(model, 1000, caches=False) == tables
    assert context_bytes(model, 1000, caches=True) == tables + 2 * 4 * layers * kv_heads * head_dim * 1000


def test_a_context_that_no_memory_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.write_tiny_llama(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=LONGEST)
    monkeypatch.setattr("edgewright.system.memory.available_bytes", lambda: 2 << 30)
    request = asking(str(model), bits=8.0, max_context=LONGEST, importance="uniform", verify=False)
    with pytest.raises(
        UserError, match=rf"a context of {LONGEST} tokens takes memory: about [0-9.]+ GiB, of which 2\.0"
    ):
        compiler.export(request, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
