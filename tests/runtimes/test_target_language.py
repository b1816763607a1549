"""The language of a translation: a forced first token, from generation_config.json or from `run --target-language`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import tiny
from helpers.requests import asking
from helpers.tiny_families import FAMILIES

from edgewright import compiler
from edgewright.bundle import Bundle
from edgewright.cli import main
from edgewright.errors import UserError
from edgewright.runtimes.generate import generate
from edgewright.runtimes.registry import open_session
from edgewright.runtimes.text_generation import open_bundle

pytestmark = pytest.mark.exports


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    model = tiny.write(folder / "model", FAMILIES["m2m_100"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.EXAMPLE / name, model / name)
    begins = {"forced_bos_token_id": 9, "decoder_start_token_id": 2, "max_new_tokens": 6}
    (model / "generation_config.json").write_text(json.dumps(begins))
    compiler.export(asking(str(model), bits=6.0, verify=False), folder / "bundle")
    return folder / "bundle"


@pytest.mark.slow
def test_an_answer_begins_with_the_language(bundle: Path) -> None:
    spec = Bundle.open(bundle).manifest.generation
    assert (spec.decoder_start, spec.forced) == (2, (9,))
    opened = open_bundle(bundle, "onnx", threads=1)
    ids = opened.read_prompt("k n i g h t").ids

    def answer(language: str) -> str:
        token = opened.tokenizer.token_id(language)
        assert token is not None
        changed = spec.model_copy(update={"forced": (token,)})
        session = open_session(Bundle.open(bundle), "onnx", 1)
        return opened.tokenizer.decode(list(generate(session, changed, ids, 6)))

    languages = ["AY", "T", "<unk>"]
    wanted = [answer(language) for language in languages]
    assert len(set(wanted)) > 1
    for language, want in zip(languages, wanted, strict=True):
        assert "".join(opened.generate(ids, target_language=language)) == want
    arguments = ["run", str(bundle), "--prompt", "k n i g h t", "--target-language", "AY"]
    assert CliRunner().invoke(main, arguments).stdout.strip() == wanted[0].strip()


@pytest.mark.slow
def test_a_language_that_is_no_token_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle, "onnx", threads=1)
    with pytest.raises(UserError, match="--target-language 'Klingon' is no token of this model"):
        opened.generate("k n", target_language="Klingon")
    monkeypatch.setattr(opened, "_spec", opened._spec.model_copy(update={"task": "causal"}))
    with pytest.raises(UserError, match="the model is no encoder-decoder; leave it out"):
        opened.generate("k n", target_language="AY")
