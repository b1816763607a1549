"""The Swift client's tokenizer against the `tokenizers` library: every kind of model and step that `embed` lets through."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.apps import project
from helpers.swift import SwiftClient, build, open_toolchain
from helpers.tokenizer_kinds import KINDS, SOME, made, same_unicode
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from edgewright.apps.platforms import PLATFORMS
from edgewright.apps.tokenizer_parts import read_parts, require_known
from edgewright.apps.traces import TEXTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def app(app_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> SwiftClient:
    swift = open_toolchain(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("tokenizers")
    project(app_bundles("llama"), folder / "app", "swift")
    return build(swift, folder / "app", folder)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Over Unicode, the same ones each time."""
    found: list[str] = []

    @settings(
        max_examples=20,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(SOME, min_size=20, max_size=20))
    def collect(some: list[str]) -> None:
        found.extend(filter(same_unicode, some))

    collect()
    assert len(found) > 300
    return [*found, *TEXTS]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tokens_and_texts_are_the_librarys(kind: str, app: SwiftClient, texts: list[str], tmp_path: Path) -> None:
    model, tokenizer = tmp_path / "model", made(kind)
    shutil.copytree(app.package / "model", model)
    file = model / "tokenizer.json"
    tokenizer.save(str(file))
    platform = PLATFORMS["swift"]
    assert platform.models is not None
    assert platform.steps is not None
    require_known(read_parts(file), platform.models, platform.steps, "swift")
    contract = json.loads((model / "app.json").read_text())
    data = file.read_bytes()
    contract["files"]["tokenizer.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (model / "app.json").write_text(json.dumps(contract))
    cases = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
    (model / "traces.json").write_text(json.dumps({"cases": [], "texts": cases, "new_tokens": 1, "tolerance": 1}))
    done = app("--model", model, "--trace", model / "traces.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"0 of 0 traces, {len(texts)} of {len(texts)} texts")
