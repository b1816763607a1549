"""`embed`: the contract and the traces say what the bundle does, what does not fit is refused, nobody's edit is overwritten."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from helpers.apps import ROOT, make_embedding_bundle, project
from helpers.cli_runner import edgewright, passed, refused

from edgewright.apps import embed as embedding
from edgewright.apps.contract import App
from edgewright.apps.platforms import PLATFORMS
from edgewright.apps.render import render
from edgewright.apps.traces import Traces, fits, replay
from edgewright.bundle import Bundle
from edgewright.device_profiles.profile import Memory, Quantity, list_profiles, save
from edgewright.errors import UserError, VerificationFailure
from edgewright.runtimes.registry import open_exact
from edgewright.runtimes.text_embedding import embed_tokens
from edgewright.runtimes.text_generation import open_bundle
from edgewright.system.hashes import of_file

SCHEMAS = {"app": App, "traces": Traces}
MODEL = "model"


@pytest.fixture(scope="module")
def bundle(app_bundles: Callable[[str], Path]) -> Path:
    """A tiny T5Gemma with a tokenizer."""
    return app_bundles("t5gemma")


@pytest.fixture(scope="module")
def made(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apps") / "cpp"
    project(bundle, folder)
    return folder


def read(folder: Path, name: str) -> dict[str, object]:
    value: dict[str, object] = json.loads((folder / MODEL / name).read_text())
    return value


def test_the_help_names_every_platform() -> None:
    assert f"{', '.join(sorted(PLATFORMS))}." in " ".join(passed(edgewright("embed", "--help")).split())


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_schema_in_the_docs_is_the_contract(name: str) -> None:
    written = json.loads((ROOT / "docs" / f"{name}.schema.json").read_text())
    assert written == SCHEMAS[name].model_json_schema()


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_what_is_written_keeps_to_the_schema(name: str, made: Path) -> None:
    value = read(made, f"{name}.json")
    jsonschema.validate(value, json.loads((ROOT / "docs" / f"{name}.schema.json").read_text()))
    assert SCHEMAS[name].model_validate(value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value | {"surprise": 1}, SCHEMAS[name].model_json_schema())


def test_every_file_is_there_with_its_hash(made: Path) -> None:
    app = App.model_validate(read(made, "app.json"))
    assert {g.file for g in app.graphs} | {"weights.bin", "tokenizer.json"} == set(app.files)
    for name, fact in app.files.items():
        path = made / MODEL / name
        assert (of_file(path), path.stat().st_size) == (fact.sha256, fact.bytes)


def test_the_contract_says_what_the_manifest_does(bundle: Path, made: Path) -> None:
    app, manifest = App.model_validate(read(made, "app.json")), Bundle.open(bundle).manifest
    spec = manifest.generation
    assert [(g.name, g.inputs, g.outputs, g.states) for g in app.graphs] == [
        (g.name, g.inputs, g.outputs, g.states) for g in manifest.graphs
    ]
    assert (app.decoder_start, app.forced, set(app.stops.tokens)) == (
        spec.decoder_start,
        spec.forced,
        set(spec.eos_ids),
    )
    facts = manifest.targets[0].facts["onnxruntime at least"]
    assert {g.name: g.onnxruntime for g in app.graphs} == {name: fact["release"] for name, fact in facts.items()}
    assert app.tokenizer is not None
    assert (app.tokenizer.kind, app.tokenizer.before, app.tokenizer.after) == ("WordLevel", (), (1,))
    caches = 2 * app.max_context * 2 * 16 * 4  # k and v of a layer, 2 heads of 16 numbers
    assert app.memory.states == caches + caches  # those of the cross-attention are as long as the longest prompt
    assert app.memory.total == app.memory.states + app.memory.weights


def test_the_traces_are_the_bundles_own_answers(bundle: Path, made: Path) -> None:
    """The other arithmetic, float32 activations, keeps within the tolerance that the file states."""
    traces, opened = Traces.model_validate(read(made, "traces.json")), Bundle.open(bundle)
    spec, session = opened.manifest.generation, open_exact(opened, "onnx", 1)
    assert session is not None
    assert len(traces.cases) >= 3
    for case in traces.cases:
        said = [s.token for s in case.steps]
        ended = said[-1] in spec.eos_ids
        assert case.ending == ("end" if ended else "limit")
        assert len(said) == traces.new_tokens or ended
        for step, logits in zip(case.steps, replay(session, spec, case, traces.new_tokens), strict=True):
            best, margin = int(logits.argmax()), step.top[0][1] - dict(step.top).get(int(logits.argmax()), -np.inf)
            assert best == step.token or margin <= traces.tolerance
            assert all(abs(logits[t] - value) <= traces.tolerance / 2 + 1e-3 for t, value in step.top)
            assert [v for _, v in step.top] == sorted((v for _, v in step.top), reverse=True)


def test_a_prompt_without_room_for_an_answer_is_no_trace(bundle: Path) -> None:
    spec = Bundle.open(bundle).manifest.generation
    assert fits(spec, [5] * spec.max_context, ())
    assert not fits(spec, [5] * (spec.max_context + 1), ())
    causal = spec.model_copy(update={"task": "causal"})
    assert not fits(causal, [5] * (spec.max_context - 1), ())
    assert not fits(causal, [], ())


def test_the_same_bundle_gives_the_same_bytes(bundle: Path, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    result = passed(edgewright("embed", bundle, "--platform", "cpp", "-o", again, "--name", bundle.name))
    assert "files" in result
    names = {p.relative_to(made) for p in made.rglob("*") if p.is_file()}
    assert names == {p.relative_to(again) for p in again.rglob("*") if p.is_file()}
    assert [n for n in sorted(names) if (made / n).read_bytes() != (again / n).read_bytes()] == []
    said = edgewright("embed", bundle, "--platform", "cpp", "-o", again, "--name", bundle.name, "--json")
    assert json.loads(passed(said))["bytes"] > 0
    assert "nothing was written" in said.stderr


def test_an_edit_is_named_and_kept(bundle: Path, made: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(made, mine)
    (mine / "main.cpp").write_text("// my own\n")
    (mine / "own.txt").write_text("mine")
    line = refused(edgewright("embed", bundle, "--platform", "cpp", "-o", mine))
    assert "1 of 12 files differ" in line
    assert "main.cpp" in line
    assert (mine / "main.cpp").read_text() == "// my own\n"


def test_no_placeholder_is_left(made: Path) -> None:
    for path in (p for p in made.rglob("*") if p.suffix in (".txt", ".md", ".cpp", ".hpp")):
        text = path.read_text()
        assert "{%" not in text, path.name
        assert "TODO" not in text, path.name
        if path.suffix in (".txt", ".md"):
            assert "{{" not in text, path.name


def test_the_card_has_the_bundles_own_figures(bundle: Path, made: Path) -> None:
    manifest, card = Bundle.open(bundle).manifest, (made / "README.md").read_text()
    assert f"{manifest.weights:,} at {manifest.average_bits:.4f}".rstrip("0") in card
    assert "The bundle was not verified" in card
    assert "k n i g h t" not in card or "--prompt" in card


# ---- a model of embeddings --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_embedding_bundle(tmp_path_factory.mktemp("embedder"))


@pytest.mark.exports
def test_vectors_have_traces_of_their_own(embedder: Path, tmp_path: Path) -> None:
    """The other arithmetic keeps within the tolerance, a vector is of length 1, and tokens are those that `run --embed` reads."""
    project(embedder, tmp_path / "app")
    app, traces = (
        App.model_validate(read(tmp_path / "app", "app.json")),
        Traces.model_validate(read(tmp_path / "app", "traces.json")),
    )
    opened = open_bundle(embedder, "onnx", threads=1)
    spec = opened.bundle.manifest.generation
    assert (app.task, app.embedding, app.chat) == ("embed", spec.embedding, None)
    assert app.tokenizer is not None
    assert (app.tokenizer.kind, app.tokenizer.before, app.tokenizer.after) == ("WordPiece", (2,), (3,))
    assert (traces.cases, len(traces.vectors)) == ((), 12)
    session = open_exact(opened.bundle, "onnx", 1)
    assert session is not None
    exact = embed_tokens(session, spec, [case.ids for case in traces.vectors])
    for case, other in zip(traces.vectors, exact, strict=True):
        assert case.text is not None
        assert list(case.ids) == opened.encode_texts([case.text])[0]
        assert np.abs(np.array(case.vector) - other).max() <= traces.tolerance
        assert np.linalg.norm(case.vector) == pytest.approx(1, abs=1e-4)
        assert np.abs(np.array(case.vector) - exact[0]).max() > 10 * traces.tolerance or case is traces.vectors[0]
    card = (tmp_path / "app" / "README.md").read_text()
    assert "48 numbers, of length 1, pooled by mean, compared by dot" in card
    assert "--embed" in card
    assert "--prompt " not in card


@pytest.mark.exports
def test_a_platform_without_a_client_for_vectors_is_refused(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = json.loads((embedder / "manifest.json").read_text())["generation"]["embedding"] | {"lower_case": True}
    line = refuses(changed(embedder, tmp_path, generation__embedding=lower), tmp_path)
    assert "texts are put into lower case before they are read" in line
    monkeypatch.setitem(PLATFORMS, "cpp", dataclasses.replace(PLATFORMS["cpp"], embeds=False))
    assert "--platform cpp has no client for a model of embeddings; choose one of" in refuses(embedder, tmp_path)


# ---- refusals, before anything is written -----------------------------------------------------------------------------


def refuses(bundle: Path, folder: Path, *options: object, platform: str = "cpp") -> str:
    output = folder / "out"
    line = refused(edgewright("embed", bundle, "--platform", platform, "-o", output, *options))
    assert list(folder.iterdir()) == []
    return line


def changed(bundle: Path, folder: Path, **values: object) -> Path:
    """A copy of the bundle whose manifest says otherwise."""
    copy = folder.with_name(folder.name + "-changed")
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for key, value in values.items():
        where = manifest
        *path, last = key.split("__")
        for part in path:
            where = where[part]
        where[last] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_an_unknown_platform_is_refused(bundle: Path, tmp_path: Path) -> None:
    assert "--platform 'cp' is none of android, cpp" in refuses(bundle, tmp_path, platform="cp")


def test_a_bundle_without_onnx_is_refused(bundle: Path, tmp_path: Path) -> None:
    target = json.loads((bundle / "manifest.json").read_text())["targets"][0] | {"format": "coreml", "files": []}
    assert "holds no onnx artefact; it has: coreml" in refuses(changed(bundle, tmp_path, targets=[target]), tmp_path)


def test_a_task_without_a_loop_is_refused(bundle: Path, tmp_path: Path) -> None:
    assert "this is a module bundle" in refuses(changed(bundle, tmp_path, generation__task="module"), tmp_path)


def test_a_runtime_that_is_too_old_is_refused(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLATFORMS, "cpp", dataclasses.replace(PLATFORMS["cpp"], runtime="1.29"))
    line = refuses(bundle, tmp_path)
    assert "has ONNX Runtime 1.29, and encoder.onnx needs 1.30.0 (GroupQueryAttention with causal)" in line
    assert "--onnxruntime 1.29" in line


def test_too_little_memory_is_refused(bundle: Path, tmp_path: Path) -> None:
    device = tmp_path.with_name(tmp_path.name + ".toml")
    known = list_profiles()[0]
    size = Quantity(value=65536, unit="bytes", source="vendor: a test", kind="vendor")
    save(known.model_copy(update={"memory": Memory(size=size)}), device)
    assert "0.00 GiB are there; export with fewer --bits" in refuses(bundle, tmp_path, "--device", device)
    save(known.model_copy(update={"memory": Memory()}), device)
    assert "does not say how much memory it has" in refuses(bundle, tmp_path, "--device", device)


def test_a_tokenizer_that_the_client_lacks_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = changed(bundle, tmp_path)
    file = copy / "checkpoint" / "tokenizer.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | {"normalizer": {"type": "NFKC"}}))
    line = refuses(copy, tmp_path, "--no-check")
    assert "its tokenizer has no normalizer:NFKC" in line
    output = tmp_path / "out"
    passed(edgewright("embed", copy, "--platform", "cpp", "-o", output, "--no-check", "--no-tokenizer"))
    app = App.model_validate(read(output, "app.json"))
    assert app.tokenizer is None
    assert not (output / MODEL / "tokenizer.json").exists()


def test_a_damaged_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = changed(bundle, tmp_path)
    with open(copy / "onnx" / "weights.bin", "r+b") as file:
        file.write(b"\xff" * 16)
    with pytest.raises(VerificationFailure, match=r"weights\.bin"):
        project(copy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(UserError, match="1000 are free"):
        project(bundle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_parts_are_no_files_of_a_project() -> None:
    with pytest.raises(Exception, match="'app' is undefined"):
        render("cpp", {})
