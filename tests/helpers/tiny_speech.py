"""Tiny speech models with a tokenizer, and task files of made-up sounds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import soundfile

from edgewright.audio.features import sample_sound
from edgewright.bundle import SoundSpec
from helpers import tiny
from helpers.tiny_families import FAMILIES

WINDOW = SoundSpec(kind="samples", rate=16000, window=384 * 2000 + 511, positions=2002, row=384, tail=511)
"""A long one: of it only the rate counts here."""

WHISPER_GENERATION: dict[str, Any] = {
    "eos_token_id": 1,
    "max_new_tokens": 16,
    "no_timestamps_token_id": 58,
    "begin_suppress_tokens": [1],
    "suppress_tokens": [2, 3],
}
"""21 timestamps, 59 to 79, for the 20 positions of a window of 0.4 s."""


def write(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny Whisper or Moonshine that can spell: with the tokenizer of the example, 70 tokens. changes: see `tiny.write`."""
    tiny.write(folder, FAMILIES[family], **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.EXAMPLE / name, folder / name)
    if family == "whisper":
        (folder / "generation_config.json").write_text(json.dumps(WHISPER_GENERATION))
    return folder


def write_sound(path: Path, seconds: float, seed: int = 0, rate: int = 16000) -> Path:
    """A made-up sound as a WAV file."""
    sound = WINDOW.model_copy(update={"rate": rate})
    soundfile.write(path, sample_sound(sound, seconds, seed), rate)
    return path


def write_task(folder: Path, count: int = 6, seconds: float = 0.35) -> Path:
    """A task file with so many sounds beside it; their answers are words that nobody said."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(count):
        write_sound(folder / f"sound{seed}.wav", seconds, seed)
        lines.append(f"sound{seed}.wav\tword number {seed} | another answer")
    (folder / "task.tsv").write_text("\n".join(lines) + "\n")
    return folder / "task.tsv"
