"""The Android client's tokenizer against the `tokenizers` library: every kind of model and step that `embed` lets through."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.android import MODEL, Client
from helpers.tokenizer_kinds import KINDS, made, texts

from edgewright.apps.platforms import PLATFORMS
from edgewright.apps.tokenizer_parts import read_parts, require_known

pytestmark = pytest.mark.slow


@pytest.fixture
def app(android_client: Client, android_projects: Callable[[str], Path]) -> tuple[Client, Path]:
    """The client, and a model."""
    return android_client, android_projects("t5gemma") / MODEL


def model_with(source: Path, folder: Path, tokenizer: bytes, cases: list[dict[str, object]]) -> Path:
    """A model with another tokenizer, and texts with what is expected of them."""
    shutil.copytree(source, folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    contract = json.loads((folder / "app.json").read_text())
    fact = {"bytes": len(tokenizer), "sha256": hashlib.sha256(tokenizer).hexdigest()}
    contract["files"]["tokenizer.json"] = fact
    (folder / "app.json").write_text(json.dumps(contract))
    (folder / "traces.json").write_text(json.dumps({"cases": [], "texts": cases, "new_tokens": 1, "tolerance": 1}))
    return folder


def test_tokens_and_texts_are_the_librarys(app: tuple[Client, Path], tmp_path: Path) -> None:
    """One process for all kinds: a JVM starts slowly."""
    client, source = app
    platform, some = PLATFORMS["android"], texts()
    assert platform.models is not None
    assert platform.steps is not None
    assert len(some) > 300
    commands: list[tuple[object, ...]] = []
    for kind in sorted(KINDS):
        tokenizer, file = made(kind), tmp_path / f"{kind}.json"
        tokenizer.save(str(file))
        require_known(read_parts(file), platform.models, platform.steps, "android")
        cases: list[dict[str, object]] = []
        for text in some:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
        commands += [("open", model_with(source, tmp_path / kind, file.read_bytes(), cases)), ("trace",)]
    said = client.run(*commands)
    assert said[::2] == [""] * len(KINDS)
    wanted = f"0 of 0 traces, {len(some)} of {len(some)} texts"
    assert {
        kind: line for kind, line in zip(sorted(KINDS), said[1::2], strict=True) if not line.startswith(wanted)
    } == {}


def test_half_a_pair_is_read_as_what_is_no_character(app: tuple[Client, Path], tmp_path: Path) -> None:
    """A string of Java may hold one; the library's cannot."""
    client, source = app
    tokenizer = made("llama3")
    ids = tokenizer.encode("a\ufffdb", add_special_tokens=False).ids
    cases = [{"text": "a\ud800b", "ids": ids, "decoded": tokenizer.decode(ids)}]
    model = model_with(source, tmp_path / "half", tokenizer.to_str().encode(), cases)
    assert client.run(("open", model), ("trace",))[1].startswith("0 of 0 traces, 1 of 1 texts")


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ({"normalizer": {"type": "NFKC"}}, "the normalizer NFKC"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "the pre-tokenizer BertPreTokenizer"),
        ({"decoder": {"type": "CTC"}}, "the decoder CTC"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "a model of the kind WordPiece"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a.*?b"}, "behavior": "Isolated"}},
            "the regular expression a.*?b",
        ),
    ],
)
def test_unknown_parts_are_refused(
    part: dict[str, object], line: str, app: tuple[Client, Path], tmp_path: Path
) -> None:
    client, source = app
    whole = json.loads(made("llama3").to_str()) | part
    (said,) = client.run(("open", model_with(source, tmp_path / "odd", json.dumps(whole).encode(), [])))
    assert said.startswith("error: tokenizer.json")
    assert line in said
