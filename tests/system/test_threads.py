"""How many threads a runtime takes where none are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgewright.bundle import Bundle
from edgewright.runtimes.registry import open_session
from edgewright.system.threads import default_threads


@pytest.mark.parametrize(
    ("said", "threads"),
    [("4", 4), ("3,2", 3), (" 2 ", 2), ("", 0), ("0", 0), ("many", 0), ("-1", 0), ("²", 0), ("99999", 0)],
)
def test_the_environment_says(said: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert default_threads() == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert default_threads() == 0


def test_a_session_has_as_many(
    tiny_bundle: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle("llama")[1])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for asked, threads in ((0, 3), (2, 2)):
        sessions = open_session(bundle, "onnx", asked).session.sessions  # type: ignore[attr-defined]
        assert {s.get_session_options().intra_op_num_threads for s in sessions.values()} == {threads}
