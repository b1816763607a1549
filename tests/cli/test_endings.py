"""How a command ends when the system refuses something, or a stranger's file is no file: one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli_runner import edgewright, refused
from helpers.tiny import write_tiny_llama

from edgewright import compiler
from edgewright.system.reading import one_line, printable, read_bytes, read_stream
from edgewright.system.writing import write_file

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


def ended(*command: object, **streams: object) -> tuple[int, str]:
    """Exit code and standard error of a process whose standard output is one of `streams`."""
    line = [sys.executable, "-m", "edgewright.cli", *map(str, command)]
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True, timeout=120, **streams)  # type: ignore[call-overload]
    return done.returncode, done.stderr


def one_error(code: int, errors: str) -> str:
    assert code == 2, errors
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    assert not last.startswith("error: unforeseen")
    return last


@needs_full
@pytest.mark.parametrize("command", ["--help", "doctor", "plan"])
def test_a_full_disk_behind_standard_output(model: Path, command: str) -> None:
    options = ("-m", model, "--bits", "5") if command == "plan" else ()
    with FULL.open("w") as full:
        line = one_error(*ended(command, *options, stdout=full))
    assert "No space left on device" in line


def test_a_reader_that_has_gone(model: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert "has gone" in one_error(*ended("plan", "-m", model, "--bits", "5", "--json", stdout=writer))
    finally:
        os.close(writer)


@needs_full
def test_a_full_disk_behind_standard_error_does_not_stop_the_work(model: Path) -> None:
    with FULL.open("w") as full:
        line = [sys.executable, "-m", "edgewright.cli", "plan", "-m", str(model), "--bits", "5"]
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=full, text=True, timeout=120)
    assert done.returncode == 0
    assert "layers.0" in done.stdout or "bits" in done.stdout


@needs_full
@pytest.mark.parametrize("option", ["-o", "--plot"])
def test_a_result_that_cannot_be_written(model: Path, option: str, tmp_path: Path) -> None:
    target = tmp_path / "full.svg"
    target.symlink_to(FULL)
    line = refused(edgewright("plan", "-m", model, "--bits", 5, option, target))
    assert "No space left on device" in line
    assert target.is_symlink()
    assert FULL.is_char_device(), "the device is not replaced by a file"


def test_a_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "plan.json"
    write_file(target, "first")
    monkeypatch.setattr(os, "replace", _refuse)
    with pytest.raises(Exception, match=r"plan\.json cannot be written \(No space left on device\); choose another -o"):
        write_file(target, "second")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert target.read_text() == "first"


def _refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_what_nobody_foresaw_is_one_line_and_a_traceback_on_request(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a \x1b[31mdefect")

    monkeypatch.setattr(compiler, "plan", broken)
    result = edgewright("plan", "-m", model, "--bits", 5)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: unforeseen TypeError: a ?[31mdefect; please report it")
    assert result.stderr.count("\n") == 1
    monkeypatch.setenv("EDGEWRIGHT_DEBUG", "1")
    assert "Traceback" in edgewright("plan", "-m", model, "--bits", 5).stderr


SPECIAL = {"a device": "/dev/zero", "a pipe": None, "a folder": "/"}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "file",
    [
        *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.gguf"),
        *("--plan", "--calibration", "--task", "--context", "manifest.json", "--device"),
    ],
)
def test_a_file_that_is_no_file_is_refused_at_once(model: Path, kind: str, file: str, tmp_path: Path) -> None:
    place = SPECIAL[kind]
    special = tmp_path / "special"
    if place is None:
        os.mkfifo(special)
    else:
        special = Path(place)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    command: tuple[object, ...] = ("plan", "-m", folder, "--bits", 5)
    if file.startswith("--"):
        names = {"--context": "notes.txt", "--plan": "plan.json", "--task": "task.tsv", "--device": "device.toml"}
        named = tmp_path / names.get(file, "text.txt")
        named.symlink_to(special)
        command = (*command, file, named)
        if file == "--plan":
            command = ("plan", "-m", folder, file, named)
        if file == "--device":
            command = ("plan", "-m", folder, "--latency", "5ms", file, named)
        if file == "--context":
            command = ("run", folder, "--prompt", "a", file, named)
    elif file == "model.gguf":
        (tmp_path / file).symlink_to(special)
        command = ("inspect", tmp_path / file)
    else:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(special)
        if file == "manifest.json":
            command = ("verify", folder)
        if file.startswith(("tokenizer", "chat")):
            if file != "tokenizer.json":
                (folder / "tokenizer.json").write_text("{}")
            command = ("inspect", folder)
    result = edgewright(*command)
    if result.exit_code == 0:
        assert kind == "a folder", "a folder in place of an optional file is as good as none"
        return
    assert "Error" not in refused(result)


def test_a_stream_has_a_bound(tmp_path: Path) -> None:
    with Path("/dev/zero").open("rb") as endless, pytest.raises(Exception, match="standard input: more than the 4096"):
        read_stream(endless, "standard input", 4096)
    with pytest.raises(Exception, match="a device, a regular file is needed"):
        read_bytes(Path("/dev/zero"), 4096)
    grown = tmp_path / "grown"
    grown.write_bytes(bytes(5000))
    with pytest.raises(Exception, match="5000 bytes, more than the 4096"):
        read_bytes(grown, 4096)
    assert read_bytes(grown, 5000) == bytes(5000)


def test_text_of_strangers_is_short_and_controls_no_terminal() -> None:
    hostile = "a\x1b]0;title\x07b\u202ec\ud800\x9b31m\nd"
    assert one_line(hostile) == "a?]0;title?b?c??31m d"
    assert printable(hostile) == "a?]0;title?b?c??31m\nd"
    assert printable("é 👩‍👩 \t\n") == "é 👩‍👩 \t\n"
    assert len(one_line("x" * 10**7)) == 240
