"""The C++ client's tokenizer against the `tokenizers` library: every kind of model and step that `embed` lets through."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.apps import client, compiled, project
from helpers.tokenizer_kinds import KINDS, SOME, WORD_PIECES, made, same_unicode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgewright.apps.platforms import PLATFORMS
from edgewright.apps.tokenizer_parts import read_parts, require_known
from edgewright.apps.traces import TEXTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def app(app_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The client, and a project."""
    folder = tmp_path_factory.mktemp("tokenizers")
    project(app_bundles("t5gemma"), folder / "app")
    return compiled(folder / "app", folder / "client", "-O1"), folder / "app" / "model"


@pytest.mark.parametrize("kind", sorted(KINDS | WORD_PIECES))
def test_tokens_and_texts_are_the_librarys(kind: str, app: tuple[Path, Path], tmp_path: Path) -> None:
    binary, source = app
    model, tokenizer = tmp_path / "model", made(kind)
    shutil.copytree(source, model)
    file = model / "tokenizer.json"
    tokenizer.save(str(file))
    platform = PLATFORMS["cpp"]
    assert platform.models is not None
    assert platform.steps is not None
    require_known(read_parts(file), platform.models, platform.steps, "cpp")
    contract = json.loads((model / "app.json").read_text())
    data = file.read_bytes()
    contract["files"]["tokenizer.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (model / "app.json").write_text(json.dumps(contract))

    @settings(max_examples=20, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(SOME, min_size=20, max_size=20))
    def agree(texts: list[str]) -> None:
        cases = []
        for text in filter(same_unicode, [*texts, *TEXTS]):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
        (model / "traces.json").write_text(json.dumps({"cases": [], "texts": cases, "new_tokens": 1, "tolerance": 1}))
        done = client(binary, "--model", model, "--trace", model / "traces.json")
        assert done.returncode == 0, done.stderr

    agree()
