"""Sound files: what is read of them, and hostile ones, which are one line."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgewright.audio import files
from edgewright.audio.files import checked, read_sound, resampled
from edgewright.errors import UserError


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "WAV"])
def test_a_sound_is_read_from_each_format(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"tone.{kind.lower()}"
    soundfile.write(path, tone(16000), 16000, format=kind)
    got = read_sound(path, 16000)
    assert got.dtype == np.float32
    assert len(got) == 8000
    np.testing.assert_allclose(got, tone(16000), atol=0.05 if kind == "OGG" else 1e-4)


def test_a_file_of_the_standard_library_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plain.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(struct.pack("<8h", 16384, 0, 0, 16384, -16384, -16384, 0, 0))
    np.testing.assert_array_equal(read_sound(path, 16000), np.array([0.25, 0.25, -0.5, 0.0], np.float32))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_another_rate_is_resampled(rate: int, tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, np.stack([tone(rate), tone(rate)], 1), rate)
    got = read_sound(path, 16000)
    assert abs(len(got) - 8000) <= 1
    inner = slice(200, 7800)  # the filter rings at both ends
    np.testing.assert_allclose(got[inner], tone(16000)[inner], atol=5e-3)


def test_the_same_rate_is_left_alone() -> None:
    samples = tone(16000)
    assert resampled(samples, 16000, 16000) is samples


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no sound that can be read"),
        (b"RIFF", "no sound that can be read"),
        (b"<html>not found</html>", "no sound that can be read"),
        (b"RIFF\xff\xff\xff\xffWAVEfmt \x10\x00\x00\x00\x01\x00\x00\x00", "no sound that can be read"),
    ],
)
def test_what_is_no_sound_is_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_sound(path, 16000)
    assert "\n" not in str(caught.value)


def test_an_empty_a_silent_and_a_numberless_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    soundfile.write(path, np.zeros(0, np.float32), 16000)
    with pytest.raises(UserError, match="there is no sound in it"):
        read_sound(path, 16000)
    soundfile.write(path, np.zeros(10, np.float32), 16000)
    assert not read_sound(path, 16000).any()
    for value in (np.nan, np.inf, 1e9):
        soundfile.write(path, np.full(10, value, np.float32), 16000, subtype="FLOAT")
        with pytest.raises(UserError, match="samples that are no numbers or above 1000"):
            read_sound(path, 16000)


def test_a_folder_a_missing_file_and_one_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="a folder, a regular file is needed"):
        read_sound(tmp_path, 16000)
    with pytest.raises(UserError, match="cannot be read"):
        read_sound(tmp_path / "none.wav", 16000)
    path = tmp_path / "long.wav"
    soundfile.write(path, tone(16000), 16000)
    monkeypatch.setattr(files, "MOST_SECONDS", 0.1)
    with pytest.raises(UserError, match="is longer than is read at once; cut it"):
        read_sound(path, 16000)
    monkeypatch.setattr(files, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="more than the 100 such a file may have"):
        read_sound(path, 16000)


def test_a_rate_that_no_speech_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.wav"
    soundfile.write(path, tone(16000), 16000)
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", 7)
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="1 channels of 7 samples a second"):
        read_sound(path, 16000)


@pytest.mark.parametrize("samples", [np.zeros((3, 2), np.float32), np.zeros(3, np.int16), np.zeros(0)])
def test_samples_that_are_none_are_refused(samples: np.ndarray) -> None:
    with pytest.raises(UserError, match="the sound: "):
        checked(samples, "the sound")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_is_one_line(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "damaged.wav"
    soundfile.write(path, tone(16000, 0.02), 16000)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(59, len(content) - 1)))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    try:
        samples = read_sound(path, 16000)
    except UserError:  # anything else is a fault
        return
    assert samples.ndim == 1
    assert np.isfinite(samples).all()
