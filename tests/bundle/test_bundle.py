"""A bundle's manifest and hashes against what strangers may put there: every defect is one line."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_cache import REVISION, in_the_hubs_cache

from edgewright.bundle import Bundle, Generation, GraphSpec, Manifest, TargetEntry, hash_files, write_manifest
from edgewright.errors import UserError, VerificationFailure
from edgewright.system import hashes, reading
from edgewright.system.hashes import of_file

FILES = ("checkpoint/config.json", "checkpoint/model.safetensors", "onnx/decoder.onnx", "onnx/weights.bin")


def write_bundle(root: Path) -> Path:
    """A small bundle with a file in each place; the artefact is not a real one."""
    for name in (*FILES, "reports/export.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"contents of {name}")
    files = ("onnx/decoder.onnx", "onnx/weights.bin")
    manifest = Manifest(
        source="model",
        source_fingerprint="0" * 64,
        model_type="llama",
        graphs=(GraphSpec(name="decoder", inputs=(), outputs=()),),
        generation=Generation(task="causal", vocab=10, max_context=32, max_new_tokens=8),
        average_bits=4.5,
        weights=100,
        targets=(TargetEntry(format="onnx", files=files, ops={}, stored_bytes=1, ideal_bytes=1),),
        prompts=((1, 2, 3),),
        files=hash_files(root),
        tools={"edgewright": "0"},
    )
    write_manifest(root, manifest)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = root / "manifest.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        Bundle.open(root)
    return one_line(caught.value)


def failure(root: Path) -> str:
    with pytest.raises(VerificationFailure) as caught:
        Bundle.open(root).check_files()
    return one_line(caught.value)


def one_line(error: Exception) -> str:
    line = str(error)
    assert line.isprintable()
    assert len(line) < 600
    return line


def test_what_is_written_is_read_and_checked(root: Path) -> None:
    bundle = Bundle.open(root)
    bundle.check_files()
    assert sorted(bundle.manifest.files) == sorted(FILES)
    assert bundle.manifest.files["onnx/weights.bin"] == of_file(root / "onnx" / "weights.bin")
    assert bundle.target("onnx").stored_bytes == 1
    with pytest.raises(UserError, match="holds no coreml artefact; it has: onnx"):
        bundle.target("coreml")
    before = (root / "manifest.json").read_bytes()
    write_manifest(root, bundle.manifest)
    assert (root / "manifest.json").read_bytes() == before
    assert not list(root.glob(".*"))


def test_reports_are_not_hashed_and_may_change(root: Path) -> None:
    bundle = Bundle.open(root)
    path = bundle.write_report("verify", {"b": 1, "a": [2.5]})
    assert json.loads(path.read_text()) == {"a": [2.5], "b": 1}
    bundle.check_files()
    assert hash_files(root) == bundle.manifest.files


@pytest.mark.parametrize("name", FILES)
def test_a_changed_or_missing_file_is_named(root: Path, name: str) -> None:
    data = bytearray((root / name).read_bytes())
    data[-1] ^= 1
    (root / name).write_bytes(data)
    assert failure(root).startswith(f"{name}: the file is not what was exported")
    (root / name).unlink()
    assert failure(root) == f"{name}: missing from the bundle"
    (root / name).mkdir()
    assert failure(root) == f"{name}: missing from the bundle"


@pytest.mark.parametrize(
    "name", ["../secret", "onnx/../../secret", "/etc/passwd", "C:/windows", "..\\secret", "a\nb", "a\0b", "\ud800"]
)
def test_a_path_that_leaves_the_bundle_is_refused(root: Path, name: str) -> None:
    (root.parent / "secret").write_text("secret")
    edit(root, lambda m: m["files"].update({name: of_file(root.parent / "secret")}))
    assert "leaves the bundle" in refusal(root)


def test_a_link_that_leaves_the_bundle_is_refused(root: Path) -> None:
    secret = root.parent / "secret"
    secret.write_text("contents of onnx/weights.bin")  # the very bytes that are expected
    (root / "onnx" / "weights.bin").unlink()
    (root / "onnx" / "weights.bin").symlink_to(secret)
    assert failure(root) == "onnx/weights.bin: a link leads out of the bundle"
    outside = root.parent / "outside"
    (root / "onnx" / "weights.bin").unlink()
    (root / "onnx" / "weights.bin").write_text("contents of onnx/weights.bin")
    (root / "onnx").rename(outside)
    (root / "onnx").symlink_to(outside, target_is_directory=True)
    assert failure(root) == "onnx/decoder.onnx: a link leads out of the bundle"


def test_links_in_a_circle_and_names_too_long_are_one_line(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    edit(root, lambda m: m["files"].update({"loop": "0"}))
    assert failure(root).startswith("loop: ")
    edit(root, lambda m: (m["files"].pop("loop"), m["files"].update({"a" * 100_000: "0"})))
    assert failure(root).startswith("aaaa")


def test_a_link_within_the_bundle_and_a_linked_bundle_are_fine(root: Path) -> None:
    (root / "onnx" / "weights.bin").rename(root / "onnx" / "real.bin")
    (root / "onnx" / "weights.bin").symlink_to("real.bin")
    (root.parent / "alias").symlink_to(root, target_is_directory=True)
    Bundle.open(root.parent / "alias").check_files()


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "later schema": (lambda m: m.update(schema_version=2), "schema version 2"),
    "no schema": (lambda m: m.pop("schema_version"), "schema version None"),
    "long schema": (lambda m: m.update(schema_version="9\n" * 10_000), "schema version"),
    "no files": (lambda m: m.pop("files"), "files: Field required"),
    "no generation": (lambda m: m.pop("generation"), "generation: Field required"),
    "half a generation": (lambda m: m["generation"].pop("vocab"), "generation.vocab: Field required"),
    "no context": (lambda m: m["generation"].update(max_context=0), "generation.max_context"),
    "negative vocabulary": (lambda m: m["generation"].update(vocab=-1), "generation.vocab"),
    "unknown task": (lambda m: m["generation"].update(task="diffusion"), "generation.task"),
    "unknown field": (lambda m: m.update(extra=1), "extra"),
    "unknown field with line breaks": (lambda m: m.update({"a\nerror: b" * 500: 1}), "not permitted"),
    "list of files": (lambda m: m.update(files=["onnx/weights.bin"]), "files"),
    "number for a hash": (lambda m: m["files"].update({"onnx/weights.bin": 1}), "files.onnx/weights.bin"),
    "text for prompts": (lambda m: m.update(prompts=[["a"]]), "prompts.0.0"),
    "artefact without a hash": (lambda m: m["files"].pop("onnx/weights.bin"), "onnx/weights.bin has no hash"),
    "checkpoint without a hash": (lambda m: m["files"].pop("checkpoint/config.json"), "has no hash"),
    "prompt without tokens": (lambda m: m.update(prompts=[[]]), "prompts.0"),
    "token beyond the vocabulary": (lambda m: m.update(prompts=[[1, 10]]), "token 10"),
    "negative token": (lambda m: m.update(prompts=[[-1]]), "prompts.0.0"),
    "no graph to decode with": (lambda m: m.update(graphs=[]), "needs the graph decoder"),
    "context of a billion": (lambda m: m["generation"].update(max_context=10**9), "generation.max_context"),
    "context of many digits": (lambda m: m["generation"].update(max_context=10**400), "generation.max_context"),
    "context that is a fraction": (lambda m: m["generation"].update(max_context=32.5), "generation.max_context"),
    "endless answer": (lambda m: m["generation"].update(max_new_tokens=10**12), "generation.max_new_tokens"),
    "vocabulary of a trillion": (lambda m: m["generation"].update(vocab=10**12), "generation.vocab"),
    "end token of many digits": (lambda m: m["generation"].update(eos_ids=[10**30]), "generation.eos_ids.0"),
    "no number of bits": (lambda m: m.update(average_bits=float("nan")), "average_bits"),
    "endless bits": (lambda m: m.update(average_bits=float("inf")), "average_bits"),
    "weights of many digits": (lambda m: m.update(weights=10**400), "weights"),
    "fewer weights than none": (lambda m: m.update(weights=-1), "weights"),
    "bytes of many digits": (lambda m: m["targets"][0].update(stored_bytes=10**400), "targets.0.stored_bytes"),
    "nodes of many digits": (lambda m: m["targets"][0].update(ops={"decoder": {"Add": 10**400}}), "ops.decoder.Add"),
    "a target twice": (lambda m: m["targets"].append(m["targets"][0]), "the target onnx is there twice"),
    "a target that is a path": (lambda m: m["targets"][0].update(format="../onnx"), "targets.0.format"),
    "a target that is a terminal's escape": (lambda m: m["targets"][0].update(format="\x1b[31m"), "targets.0.format"),
    "a file of another target": (
        lambda m: m["targets"][0]["files"].append("checkpoint/config.json"),
        "checkpoint/config.json lies outside the folder onnx",
    ),
    "a graph twice": (lambda m: m["graphs"].append(m["graphs"][0]), "the graph decoder is there twice"),
    "an input twice": (
        lambda m: m["graphs"][0].update(inputs=[{"name": "x", "dtype": "int64", "shape": [1]}] * 2),
        "the input x is there twice",
    ),
    "a shape of a thousand dimensions": (
        lambda m: m["graphs"][0].update(inputs=[{"name": "x", "dtype": "int64", "shape": [1] * 1000}]),
        "graphs.0.inputs.0.shape",
    ),
    "a file in two spellings": (lambda m: m["files"].update({"ONNX/Weights.bin": "0"}), "is there twice"),
    "a path that is not plain": (lambda m: m["files"].update({"onnx/./x": "0"}), "not written plainly"),
    "facts without end": (lambda m: m["targets"][0].update(facts={"x": "y" * (2 << 20)}), "facts of more than"),
    "facts that are no number": (lambda m: m["targets"][0].update(facts={"x": float("nan")}), "targets.0"),
    "graph name that is a path": (
        lambda m: m.update(graphs=[{"name": "../decoder", "inputs": [], "outputs": []}]),
        "graphs.0.name",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_manifest_names_the_field(root: Path, kind: str) -> None:
    change, word = DAMAGES[kind]
    edit(root, change)
    assert word in refusal(root)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a":' * 200_000, "not valid JSON"),
        (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", "nested deeper"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[]", "JSON list"),
        (b"null", "JSON NoneType"),
        (b"1" * 10_000, "not valid JSON"),
    ],
)
def test_a_manifest_that_is_no_manifest(root: Path, text: bytes, word: str) -> None:
    (root / "manifest.json").write_bytes(text)
    assert word in refusal(root)


def test_a_manifest_too_large_is_not_read(root: Path) -> None:
    with (root / "manifest.json").open("r+b") as file:
        file.truncate((64 << 20) + 1)
    assert "bytes" in refusal(root)


def test_what_is_not_a_bundle(tmp_path: Path) -> None:
    assert "is not a bundle" in refusal(tmp_path)
    assert "is not a bundle" in refusal(tmp_path / "absent")
    (tmp_path / "manifest.json").mkdir()
    assert "is not a bundle" in refusal(tmp_path)


# Pipes, devices and many files


pipes = pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")


@pipes
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_place_of_a_file_does_not_wait_for_a_writer(root: Path, name: str) -> None:
    (root / name).unlink()
    os.mkfifo(root / name)
    assert failure(root) == f"{name}: no regular file"


@pipes
def test_a_file_swapped_for_a_pipe_while_it_is_checked_does_not_hang(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at the file and its opening are two steps."""
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    (root / "onnx" / "weights.bin").unlink()
    os.mkfifo(root / "onnx" / "weights.bin")
    assert "a pipe, a regular file is needed" in failure(root)


@pipes
def test_what_is_beside_the_files_of_a_target_is_plain_too(root: Path) -> None:
    """A graph may name any file of its folder, in the manifest or not."""
    bundle = Bundle.open(root)
    (root / "onnx" / "notes.txt").write_text("harmless")
    (root / "onnx" / "inside.bin").symlink_to("weights.bin")
    bundle.check_target("onnx")
    os.mkfifo(root / "onnx" / "pipe")
    with pytest.raises(UserError, match="pipe: no regular file"):
        bundle.check_target("onnx")
    (root / "onnx" / "pipe").unlink()
    (root / "checkpoint" / "deep").mkdir()
    (root / "checkpoint" / "deep" / "link").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="link: a link leads out of the bundle"):
        bundle.check_target("onnx")


def test_only_what_a_target_reads_is_hashed_for_it(root: Path) -> None:
    (root / "coreml").mkdir()
    (root / "coreml" / "program").write_text("text")
    (root / "checkpoint" / "tokenizer.json").write_text("{}")
    more = {f"{d}/{n}": of_file(root / d / n) for d, n in (("coreml", "program"), ("checkpoint", "tokenizer.json"))}
    edit(root, lambda m: m["files"].update(more))
    bundle = Bundle.open(root)
    read = {"checkpoint/config.json", "checkpoint/tokenizer.json", "onnx/decoder.onnx", "onnx/weights.bin"}
    assert set(bundle.files_of("onnx")) == read
    for name in ("coreml/program", "checkpoint/model.safetensors"):
        (root / name).write_text("changed")
    bundle.check_target("onnx")
    (root / "checkpoint" / "tokenizer.json").write_text("changed")
    with pytest.raises(VerificationFailure, match=r"^checkpoint/tokenizer\.json: the file is not what was exported"):
        bundle.check_target("onnx")
    with pytest.raises(UserError, match="holds no qnn artefact"):
        bundle.check_target("qnn")


@pipes
def test_a_report_is_not_written_into_a_pipe(root: Path) -> None:
    (root / "reports").mkdir(exist_ok=True)
    for name in ("verify.json", ".verify.json.partial"):
        os.mkfifo(root / "reports" / name)
    path = Bundle.open(root).write_report("verify", {"passed": True})
    assert json.loads(path.read_text()) == {"passed": True}
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        Bundle.open(root).write_report("verify", {})


def test_the_first_of_many_faults_is_named_whatever_thread_finds_it(root: Path) -> None:
    files = {f"onnx/{i:03}": "0" * 64 for i in range(200)}
    for i, name in enumerate(files):
        (root / name).write_bytes(bytes(1000 * (200 - i)))
    assert hashes.first_fault(root, files) == ("onnx/000", "the file is not what was exported (its SHA-256 differs)")
    right = dict(zip(files, hashes.of_files([root / name for name in files]), strict=True))
    assert hashes.first_fault(root, right) is None
    assert hashes.first_fault(root, right | {"onnx/150": "0"}) == (
        "onnx/150",
        "the file is not what was exported (its SHA-256 differs)",
    )
    assert hashes.first_fault(root, {}) is None


def test_a_snapshot_of_the_hubs_cache_is_a_bundle(root: Path, tmp_path: Path) -> None:
    snapshot = in_the_hubs_cache(root, tmp_path / "cache")
    bundle = Bundle.open(snapshot)
    bundle.check_files()
    bundle.check_target("onnx")
    weights = snapshot / "onnx" / "weights.bin"
    weights.resolve().write_text("changed")
    assert failure(snapshot) == "onnx/weights.bin: the file is not what was exported (its SHA-256 differs)"


@pytest.mark.parametrize(
    "target", ["../../../secret", "../../../blobs/secret", "../../../blobs/deep/" + "0" * 64, "/etc/passwd"]
)
def test_no_other_link_of_a_snapshot_is_followed(root: Path, tmp_path: Path, target: str) -> None:
    snapshot = in_the_hubs_cache(root, tmp_path / "cache")
    weights = snapshot / "onnx" / "weights.bin"
    content = weights.read_bytes()
    weights.unlink()
    weights.symlink_to(target)
    if not target.startswith("/"):
        (weights.parent / target).parent.mkdir(exist_ok=True)
        (weights.parent / target).write_bytes(content)
    assert failure(snapshot) == "onnx/weights.bin: a link leads out of the bundle"
    with pytest.raises(UserError, match="a link leads out of the bundle"):
        Bundle.open(snapshot).require_plain("onnx")


def test_a_blob_that_is_a_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    snapshot = in_the_hubs_cache(root, tmp_path / "cache")
    blob = (snapshot / "onnx" / "weights.bin").resolve()
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    assert failure(snapshot) == "onnx/weights.bin: a link leads out of the bundle"
    blob.unlink()
    (tmp_path / "elsewhere").rename(blob)
    Bundle.open(snapshot).check_files()
    blobs = blob.parent
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    assert "a link leads out of the bundle" in failure(snapshot)


def test_what_lies_like_a_snapshot_but_is_none_of_the_hubs(root: Path, tmp_path: Path) -> None:
    snapshot = in_the_hubs_cache(root, tmp_path / "cache")
    snapshot.parents[1].rename(tmp_path / "cache" / "bundle")
    moved = tmp_path / "cache" / "bundle" / "snapshots" / REVISION
    assert "a link leads out of the bundle" in failure(moved)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_file_that_the_system_does_not_let_read_is_trouble_and_no_failure(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    bundle = Bundle.open(root)
    monkeypatch.setattr(reading.os, "open", refuse)
    with pytest.raises(UserError, match=re.escape(f"cannot be read ({os.strerror(number)}); mend that")):
        bundle.check_files()
