"""What strangers and accidents may hand over, beyond the plain cases in test_cli.py: each is one line and leaves nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers import hostile_graphs as hostile
from helpers.hostile_values import deep_list
from helpers.requests import asking
from helpers.tiny import merged, write_tiny_llama, write_tiny_t5gemma

from edgewright import compiler
from edgewright.bundle import Bundle
from edgewright.cli import main
from edgewright.errors import UserError, VerificationFailure
from edgewright.quant.quantize_checkpoint import quantize_checkpoint
from edgewright.runtimes.text_generation import open_bundle


def edgewright(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def refused(result: Result) -> str:
    """The one line of a user's mistake: exit code 2, nothing on standard output, no exception that was not foreseen."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == result.stderr.splitlines()[-1:], result.stderr
    assert errors[0].isprintable()
    assert len(errors[0]) < 600
    assert not errors[0].startswith("error: unforeseen")
    return errors[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_t5gemma(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[[str], tuple[Path, Path]]) -> Path:
    """A bundle of one layer of each stack. Must not be written to."""
    return tiny_bundle("t5gemma")[1]


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


# Configs


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"eos_token_id": [[1]]}, "eos_token_id"),
        ({"eos_token_id": ["</s>", 1]}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": "\x1b[31m" * 1000}, "eos_token_id"),
        ({"decoder": {"eos_token_id": {"a": 1}}}, "eos_token_id"),
        ({"decoder_start_token_id": 70}, "decoder_start_token_id"),
        ({"decoder_start_token_id": []}, "decoder_start_token_id"),
        ({"decoder": {"max_position_embeddings": 1}}, "max_position_embeddings"),
        ({"decoder": {"max_position_embeddings": 6}}, "at least 7"),
        ({"encoder": {"max_position_embeddings": 4}}, "at least 5"),
        ({"decoder": {"layer_types": "sliding_attention"}}, "layer_types"),
        ({"decoder": {"rope_parameters": {"rope_type": ["linear"]}}}, "rope_type"),
        ({"decoder": {"rms_norm_eps": float("inf")}}, "rms_norm_eps"),
    ],
)
def test_a_hostile_config_is_one_line(model: Path, tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    bad = shutil.copytree(model, tmp_path / "bad")
    config = merged(json.loads((bad / "config.json").read_text()), changes)
    (bad / "config.json").write_text(json.dumps(config))
    assert word in refused(edgewright("export", "-m", bad, "-o", tmp_path / "bundle"))
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_a_stray_decoder_section_does_not_matter(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", decoder=5)
    assert edgewright("plan", "-m", model).exit_code == 0


@pytest.mark.slow
def test_the_shortest_context_a_graph_is_traced_with_exports(model: Path, tmp_path: Path) -> None:
    short = shutil.copytree(model, tmp_path / "short")
    changes = {"encoder": {"max_position_embeddings": 5}, "decoder": {"max_position_embeddings": 7}}
    config = merged(json.loads((short / "config.json").read_text()), changes)
    (short / "config.json").write_text(json.dumps(config))
    made = compiler.export(asking(str(short), num_layers=1, max_context=2), tmp_path / "bundle")
    assert made.report is not None
    assert made.report.passed
    assert made.manifest.generation.max_context == 2
    assert {len(p) for p in made.manifest.prompts} == {1}


@pytest.mark.parametrize("asked", [1, 0, -3])
def test_a_context_that_holds_nothing_is_refused(model: Path, asked: int) -> None:
    assert f"--max-context {asked}" in refused(edgewright("plan", "-m", model, "--max-context", asked))


def test_prompts_that_do_not_fit_are_refused_before_work(model: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.tsv"
    task.write_text("a b c d e f g h i j\tX\n")
    line = refused(edgewright("export", "-m", model, "--task", task, "--max-context", 8, "-o", tmp_path / "bundle"))
    assert "does not fit --max-context 8" in line
    assert [p.name for p in tmp_path.iterdir()] == ["task.tsv"]


@pytest.mark.slow
def test_a_tokenizer_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.tsv"
    task.write_text("w x y z\tX\n")
    small = write_tiny_t5gemma(
        tmp_path / "small", vocab_size=20, encoder={"vocab_size": 20}, decoder={"vocab_size": 20}
    )
    line = refused(edgewright("plan", "-m", small, "--task", task))
    assert "is the tokenizer of another model?" in line
    assert edgewright("plan", "-m", model, "--task", task).exit_code == 0


# Manifests


def no_decoder(m: dict[str, Any]) -> None:
    m["graphs"] = [g for g in m["graphs"] if g["name"] != "decoder"]


def state_of(m: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = next(g for g in m["graphs"] if g["name"] == "decoder")["states"][0]
    return state


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a graph is missing": (no_decoder, "needs the graph decoder"),
    "no start token": (lambda m: m["generation"].update(decoder_start=None), "decoder_start"),
    "start beyond the vocabulary": (lambda m: m["generation"].update(decoder_start=10**6), "not below the vocabulary"),
    "prompt beyond the vocabulary": (lambda m: m.update(prompts=[[1, 70]]), "token 70 is not below"),
    "negative token": (lambda m: m.update(prompts=[[-1]]), "prompts.0.0"),
    "no prompts, nothing to compare": (lambda m: m.update(prompts=[]), "prompts"),
    "no targets, nothing to check": (lambda m: m.update(targets=[]), "targets"),
    "an empty prompt": (lambda m: m.update(prompts=[[1], []]), "prompts.1"),
    "a weight file without hash": (lambda m: m["files"].pop("onnx/weights.bin"), "onnx/weights.bin has no hash"),
    "a checkpoint without hash": (lambda m: m["files"].pop("checkpoint/model.safetensors"), "has no hash"),
    "a target's file outside": (lambda m: m["targets"][0]["files"].append("../../etc/passwd"), "lies outside"),
    "unknown dtype": (lambda m: state_of(m).update(dtype="complex128"), "dtype"),
    "unknown dimension": (lambda m: state_of(m).update(shape=["batch", "nonsense"]), "shape"),
    "size of a terabyte": (lambda m: state_of(m).update(shape=["batch", 1 << 40]), "shape"),
    "context of ten millions more": (lambda m: m["generation"].update(max_context=10**12), "generation.max_context"),
    "an answer of a trillion": (lambda m: m["generation"].update(max_new_tokens=10**12), "generation.max_new_tokens"),
    "a target twice": (lambda m: m["targets"].append(m["targets"][0]), "the target onnx is there twice"),
    "a file of the checkpoint": (lambda m: m["targets"][0]["files"].append("checkpoint/config.json"), "lies outside"),
    "nested facts": (lambda m: m["targets"][0].update(facts={"x": deep_list(70)}), "nested deeper"),
    "escapes in a key": (lambda m: m.update({"\x1b[31m\n" * 100: 1}), "Extra inputs"),
    "long version": (lambda m: m.update(schema_version="9\n" * 9999), "schema version"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_hostile_manifest_is_one_line_for_every_command(copy: Path, kind: str) -> None:
    change, word = MANIFESTS[kind]
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for command in (("verify", copy), ("run", copy, "--prompt", "a"), ("profile", copy), ("inspect", copy)):
        assert word in refused(edgewright(*command))


@pytest.mark.parametrize(
    "facts",
    [
        {"vendor_simulated": []},
        {"vendor_simulated": {"programs": 5}},
        {"vendor_simulated": {"programs": {"a": {"b": {}}}}},
        {"vendor_simulated_too": {"simulator": 1}},
    ],
)
def test_facts_of_another_form_are_one_line(copy: Path, facts: dict[str, Any]) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["targets"][0]["facts"] = facts
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "no figures of a simulator" in refused(edgewright("profile", copy, "-p", 2, "-n", 1, "-r", 1))


# Artefacts


FILES = ("onnx/decoder.onnx", "onnx/weights.bin", "checkpoint/tokenizer.json", "checkpoint/config.json")


@pytest.mark.parametrize("name", FILES)
def test_what_run_and_profile_read_is_hashed_before_it_is_loaded(copy: Path, name: str) -> None:
    """What is added changes nothing that a reader would notice: an empty comment, or a blank line."""
    with (copy / name).open("ab") as file:
        file.write(b"\x32\0" if name.endswith(".onnx") else b"\n")
    for command in (("run", copy, "--prompt", "a b"), ("profile", copy, "-p", 2, "-n", 1, "-r", 1)):
        result = edgewright(*command)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith(f"verification failed: {name}: the file is not what was")
    with pytest.raises(VerificationFailure, match="is not what was exported"):
        open_bundle(copy)
    assert len(list(open_bundle(copy, check=False).generate("a b", max_new_tokens=2))) <= 2
    assert edgewright("run", copy, "--no-check", "--prompt", "a b", "-n", 2).exit_code == 0


def test_the_weights_of_the_checkpoint_are_not_read_by_run(copy: Path) -> None:
    (copy / "checkpoint" / "model.safetensors").write_bytes(b"changed")
    assert edgewright("run", copy, "--prompt", "a b", "-n", 2).exit_code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in folders")
@pytest.mark.parametrize("name", [*FILES, "onnx/beside", "checkpoint/chat_template.jinja"])
def test_a_pipe_in_a_bundle_keeps_no_command_waiting(copy: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    commands = (
        ("verify", copy),
        ("run", copy, "--prompt", "a"),
        ("run", copy, "--no-check", "--prompt", "a"),
        ("profile", copy, "-p", 2, "-n", 1, "-r", 1),
    )
    for command in commands:
        result = edgewright(*command)
        assert result.exit_code in (1, 2), command
        assert result.stdout == ""
        assert re.search("regular file|no tokenizer", result.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hostile.endless_loop, "a graph inside 'Loop'"),
        (hostile.weights_in("/dev/zero"), "outside its folder"),
        (hostile.foreign_op, "ops of the domain 'stranger'"),
        (hostile.huge_weight, "more elements than any file holds"),
        (hostile.other_logits, "decoder does not run"),
        (hostile.filled_memory(1 << 20), "does not"),
    ],
)
def test_run_is_not_kept_busy_by_a_hostile_graph(copy: Path, change: hostile.Edit, words: str) -> None:
    hostile.edit_graph(copy, change)
    assert words in refused(edgewright("run", copy, "--prompt", "a b", "-t", 1))


def test_an_answer_that_no_memory_holds_is_refused_by_the_figure(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["generation"]["max_context"] = manifest["generation"]["max_new_tokens"] = 1 << 24
    (copy / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("edgewright.system.memory.available_bytes", lambda: 1 << 30)
    for options in ((), ("-n", 1 << 24)):
        line = refused(edgewright("run", copy, "--prompt", "a", *options))
        assert "tokens take memory: about" in line
        assert "of which 1.0 GiB are available" in line


@pytest.mark.slow
def test_a_report_never_leaves_the_bundle(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (copy / "reports" / "verify.json").symlink_to(victim)
    Bundle.open(copy).write_report("verify", {"passed": True})
    assert victim.read_text() == "kept"
    assert json.loads((copy / "reports" / "verify.json").read_text()) == {"passed": True}
    shutil.rmtree(copy / "reports")
    (copy / "reports").symlink_to(outside)
    with pytest.raises(UserError, match="link"):
        Bundle.open(copy).write_report("verify", {})
    assert list(outside.iterdir()) == []
    (copy / "reports").unlink()
    (copy / "reports").write_text("a file")
    assert "cannot be written" in refused(edgewright("verify", copy))


# Options and input


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--size", "9" * 400 + "g"),
        ("plan", "--size", "12ig"),
        ("plan", "--widths", "9" * 5000),
        ("plan", "--widths", ""),
        ("plan", "--widths", "-4"),
        ("plan", "--bits", "many"),
        ("plan", "--importance", "best"),
        ("plan", "--nonsense"),
        ("nonsense",),
        ("devices", "nonsense"),
        ("plan", "--max-context", 10**12),
        ("plan", "--max-context", 10**400),
        ("plan", "--max-context", "1e3"),
        ("plan", "--num-layers", 10**12),
        ("plan", "--workers", 10**6),
        ("plan", "--workers", 0),
        ("plan", "--bits", "4,5"),
        ("plan", "--memory-limit", "9" * 30),
        ("plan", "--latency", "1e9"),
        ("plan", "--group-size", 10**6),
        ("verify", "x", "-t", 10**9),
        ("verify", "x", "--text-windows", 10**6),
        ("verify", "x", "--task-limit", 10**12),
        ("run", "x", "--prompt", "a", "-n", 10**12),
        ("run", "x", "--prompt", "a", "-n", 10**400),
        ("run", "x", "--prompt", "a", "-t", 10**9),
        ("run", "x", "--prompt", "a", "--seed", 10**30),
        ("profile", "x", "-p", 10**12),
        ("profile", "x", "-n", 10**12),
        ("profile", "x", "-d", "1" * 20),
        ("profile", "x", "-r", 10**12),
        ("profile", "x", "-t", -1),
        ("rewrite", "--seed", 10**30),
    ],
)
def test_an_unreadable_option_is_one_line_too(model: Path, arguments: tuple[str, ...]) -> None:
    command, *rest = arguments
    assert "--help" in refused(edgewright(command, *(("-m", model) if command == "plan" else ()), *rest))


def test_a_missing_option_is_one_line_and_a_bare_group_shows_help(bundle: Path) -> None:
    assert "--prompt TEXT" in refused(edgewright("run", bundle))
    bare = edgewright("devices")
    assert bare.exit_code == 2
    assert "measure" in bare.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "1e-320"),
        ("--temperature", "-1"),
        ("--top-p", "nan"),
        ("--top-p", "0"),
        ("--seed", "-1"),
        ("-n", "0"),
        ("-t", "-1"),
    ],
)
def test_sampling_that_means_nothing_is_refused(bundle: Path, options: tuple[str, str]) -> None:
    assert options[0] in refused(edgewright("run", bundle, "--prompt", "a", *options))


def test_bytes_that_are_no_text_are_refused(bundle: Path) -> None:
    assert "not UTF-8" in refused(edgewright("run", bundle, "--prompt", "-", stdin=b"\xff\xfe"))
    refused(edgewright("run", bundle, "--prompt", "\udcff"))
    assert "empty" in refused(edgewright("run", bundle, "--prompt", " \n"))


def test_profile_with_nothing_to_measure_or_rows_left_out(bundle: Path) -> None:
    assert "measures nothing" in refused(edgewright("profile", bundle, "-p", 0, "-n", 0))
    assert "-n" in refused(edgewright("profile", bundle, "-p", 4, "-n", -5))
    result = edgewright("profile", bundle, "-p", 0, "-n", 2, "-r", 1, "-t", 1, "-o", "json")
    assert [row["test"] for row in json.loads(result.stdout)["targets"]["onnx"]["rows"]] == ["tg2"]


def test_doctor_knows_a_module_without_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = edgewright("doctor")
    assert result.exit_code == 0
    assert "of unknown version" in result.stdout


# Disks


def test_a_size_is_the_size_of_the_file(model: Path, tmp_path: Path) -> None:
    for size in (120_000, 150_001, 200_000, 299_999):
        planned = compiler.plan(asking(str(model), size=size))
        out = tmp_path / str(size)
        quantize_checkpoint(planned.checkpoint, planned.plan, planned.model.tied, out, planned.other)
        assert 0.97 * size < (out / "model.safetensors").stat().st_size <= size


def test_an_output_that_cannot_be_made_is_refused_before_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        assert "exists already" in refused(edgewright("export", "-m", model, "-o", tmp_path / name))
    for name in ("file/bundle", "n" * 300):
        result = edgewright("export", "-m", model, "-o", tmp_path / name)
        assert "cannot be made" in refused(result)
        assert len(result.stderr.splitlines()) == 1  # no note of any work
    for option in ("-o", "--plot"):
        assert "cannot be written" in refused(edgewright("plan", "-m", model, option, tmp_path / "absent" / "p.svg"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["bundle", "n" * 255])  # 255: as long as a name may be
def test_a_full_disk_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    class Full:
        @staticmethod
        def export(graphs: Any, directory: Path, options: Any, progress: Any) -> None:
            (directory / "weights.bin").write_bytes(b"half")
            written.append(directory)
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr("edgewright.exporters.registry.exporter", lambda name: Full)
    line = refused(edgewright("export", "-m", model, "-o", tmp_path / name))
    assert "cannot be written" in line
    assert os.strerror(28) in line
    assert len(written) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_is_no_failed_verification(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "quantize", interrupt)
    result = edgewright("export", "-m", model, "-o", tmp_path / "bundle")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_killed_export_leaves_no_bundle(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "edgewright.cli", "export", "-m", str(model), "--against", "none", "-o", str(out)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("onnx:"):  # the partial folder is there by now
            break
    assert [p.name.endswith(".partial") for p in tmp_path.iterdir()] == [True]
    child.send_signal(number)
    stdout, stderr = child.communicate(timeout=120)
    assert stdout == ""
    assert "Traceback" not in stderr
    assert not out.exists()
    if number == signal.SIGKILL:
        assert child.returncode == -number
        assert all(p.name.startswith(".bundle.") and p.name.endswith(".partial") for p in tmp_path.iterdir())
    else:
        assert child.returncode == 128 + number
        assert list(tmp_path.iterdir()) == []
