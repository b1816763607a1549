"""Speech models as a user runs them: exported, verified with a word error rate, a sound written down; or one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import tiny, tiny_speech
from helpers.cli_runner import edgewright, passed, refused

import edgewright as ew
from edgewright.audio.files import read_sound
from edgewright.bundle import Bundle
from edgewright.errors import UserError
from edgewright.runtimes.transcribe import SpeechOptions

pytestmark = pytest.mark.exports


ONE_LAYER = {
    "whisper": {"encoder_layers": 1, "decoder_layers": 1},
    "moonshine": {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1},
}


@pytest.fixture(scope="module", params=[pytest.param("moonshine", marks=pytest.mark.slow), "whisper"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a bundle of it that was calibrated on a task of sounds, and the task."""
    root = tmp_path_factory.mktemp(family)
    tiny_speech.write(root / "model", family, **ONE_LAYER[family])
    task = tiny_speech.write_task(root / "sounds")
    options = ("--bits", "6", "--task", task, "--max-context", "48", "-o", root / "bundle")
    done = edgewright("export", "-m", root / "model", *options)
    said = passed(done)
    assert "onnx: lowering error (float32 activations)" in said
    return root


def test_the_manifest_holds_what_run_needs_of_sound(folder: Path, family: str) -> None:
    manifest = Bundle.open(folder / "bundle").manifest
    speech = manifest.generation.speech
    assert speech is not None
    assert manifest.prompts == ()
    assert speech.sound.rate == 16000
    assert speech.sound.kind == ("log-mel" if family == "whisper" else "samples")
    assert (speech.no_timestamps, speech.suppress) == ((58, (2, 3)) if family == "whisper" else (None, ()))


def test_the_convolutions_are_quantized(folder: Path, family: str) -> None:
    checkpoint = folder / "bundle" / "checkpoint"
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = set(file.keys())
    front = "model.encoder.front."
    wanted = ["conv1.patches", "conv2.patches"] if family == "whisper" else ["conv2", "conv3"]
    assert {f"{front}{name}.weight.codes" for name in wanted} <= names


def test_verify_tells_the_word_error_rate_before_and_after(folder: Path) -> None:
    task = folder / "sounds" / "task.tsv"
    done = edgewright("verify", folder / "bundle", "-m", folder / "model", "--task", task, "--task-limit", 3)
    found = re.search(r"onnx: word error rate ([\d.]+)% of 3 sounds; original ([\d.]+)%, difference", passed(done))
    assert found is not None
    report = json.loads((folder / "bundle" / "reports" / "verify.json").read_text())
    assert report["original_word_error_rate"] > 0.5
    assert report["targets"][0]["word_error_rate"] > 0.5
    assert report["targets"][0]["task_accuracy"] is None


def test_a_sound_is_written_down(folder: Path, tmp_path: Path) -> None:
    """Of any length and rate, through the command and through the API alike."""
    sound = tiny_speech.write_sound(tmp_path / "a.wav", 1.3, rate=22050)
    said = passed(edgewright("run", folder / "bundle", "--audio", sound))
    with_path = "".join(p.text for p in ew.open_bundle(folder / "bundle").transcribe(sound))
    opened = ew.open_bundle(folder / "bundle")
    pieces = list(opened.transcribe(read_sound(sound, 16000)))
    assert with_path == "".join(p.text for p in pieces)
    assert said.split() == with_path.split() or said.replace(" ", "").strip() == with_path.replace(" ", "")
    assert [p.start for p in pieces] == sorted(p.start for p in pieces)
    assert pieces[-1].end <= 1.4


def test_timestamps_are_lines(folder: Path, family: str, tmp_path: Path) -> None:
    sound = tiny_speech.write_sound(tmp_path / "a.wav", 1.0)
    done = edgewright("run", folder / "bundle", "--audio", sound, "--timestamps")
    if family == "moonshine":
        assert "this model tells no times" in refused(done)
        return
    lines = passed(done).splitlines()
    assert lines
    assert all(re.match(r"\[\d\d:\d\d\.\d\d --> \d\d:\d\d\.\d\d\] ?", line) for line in lines)
    pieces = list(ew.open_bundle(folder / "bundle").transcribe(sound, SpeechOptions(timestamps=True)))
    assert len(pieces) == len(lines)


def test_what_does_not_go_together_is_one_line(folder: Path, tmp_path: Path) -> None:
    sound = tiny_speech.write_sound(tmp_path / "a.wav", 0.2)
    bundle = folder / "bundle"
    assert "--prompt TEXT, or a sound to write down" in refused(edgewright("run", bundle))
    assert "one of them" in refused(edgewright("run", bundle, "--audio", sound, "--prompt", "hi"))
    assert "this model reads sound, not text" in refused(edgewright("run", bundle, "--prompt", "hi", "--no-chat"))
    assert "--timestamps goes with --audio FILE" in refused(edgewright("run", bundle, "--prompt", "hi", "--timestamps"))
    assert "the model knows one language" in refused(edgewright("run", bundle, "--audio", sound, "--language", "de"))
    assert "transcribes alone" in refused(edgewright("run", bundle, "--audio", sound, "--translate"))
    assert "no sound that can be read" in refused(edgewright("run", bundle, "--audio", folder / "sounds" / "task.tsv"))
    assert "goes with a prompt" in refused(edgewright("run", bundle, "--audio", sound, "--target-language", "de"))
    text = tmp_path / "text.txt"
    text.write_text("some text " * 200)
    assert "--text is read as a prompt" in refused(edgewright("verify", bundle, "--text", text))


def test_calibration_data_of_speech_are_sounds(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text " * 200)
    assert "this model reads sound; give --task FILE.tsv" in refused(
        edgewright("export", "-m", folder / "model", "--calibration", text, "--dry-run")
    )
    task = tmp_path / "task.tsv"
    for name, said in (
        ("../a.wav", "sounds lie in the folder"),
        ("/a.wav", "sounds lie in"),
        ("a.wav", "cannot be read"),
    ):
        task.write_text(f"{name}\twhat is said\n")
        assert said in refused(edgewright("export", "-m", folder / "model", "--task", task, "--dry-run"))


def test_profile_measures_seconds_of_sound(folder: Path) -> None:
    said = passed(edgewright("profile", folder / "bundle", "-r", 1, "-n", 4))
    assert "seconds of sound a second" in said
    assert "tg4" in said
    assert "this model reads sound" in refused(edgewright("profile", folder / "bundle", "-p", 16))


def test_a_manifest_that_does_not_fit_the_encoder_is_one_line(folder: Path, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "bundle"
    shutil.copytree(folder / "bundle", root)
    values = json.loads((root / "manifest.json").read_text())
    for keys, value in (
        (("sound", "kind"), "mp3"),
        (("sound", "rate"), 0),
        (("sound", "window"), 1 << 30),
        (("sound", "positions"), 7),
        (("sound", "mels"), 17),
        (("sound", "row"), 17),
        (("suppress",), [80]),
        (("no_timestamps",), 99),
        (("tokens_a_second",), -1),
    ):
        changed = json.loads(json.dumps(values))
        place = changed["generation"]["speech"]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (root / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="export the bundle again"):
            Bundle.open(root)


@pytest.mark.slow
def test_a_model_of_text_hears_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny.write_tiny_t5gemma(tmp_path / "model")
    passed(edgewright("export", "-m", model, "--bits", "6", "--no-verify", "-o", tmp_path / "bundle"))
    sound = tiny_speech.write_sound(tmp_path / "a.wav", 0.2)
    assert "reads text, not sound" in refused(edgewright("run", tmp_path / "bundle", "--audio", sound))
