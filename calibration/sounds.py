"""Task files of sounds: what a speech model is calibrated, compared and scored on.

A line is a sound file, a tab, and what is said in it; the file lies in the folder of the task file or below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ..audio.features import encoder_inputs, sample_sound
from ..audio.files import read_sound
from ..bundle import SoundSpec
from ..errors import UserError
from ..runtimes.session import Array
from ..system.reading import one_line
from .prompts import Task

Sound = Mapping[str, Array]
"""The inputs of the graph `encoder` for one sound, one row."""

SOUNDS = 4
"""Sounds that a bundle is compared on, at most; each takes the whole window of a model that has one length."""

_SECONDS = 3.0, 1.1, 5.0, 2.2
"""Of the made-up ones."""


def sound_file(task: Path, name: str) -> Path:
    """The file that a task file names. Raises UserError for one outside its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise UserError(
            f"{task}: {one_line(name, 80)}: sounds lie in the folder of the task file; name them from there"
        )
    return task.parent / name


def sounds_of(task: Path, read: Task, sound: SoundSpec) -> Iterator[tuple[Sound, str]]:
    """The sounds of a task that fit one window, each with its first answer. Raises UserError for what cannot be read."""
    for name, answers in zip(read.prompts, read.answers, strict=True):
        samples = read_sound(sound_file(task, name), sound.rate)
        if len(samples) <= sound.window:
            yield encoder_inputs(sound, samples), answers[0]


def made_up_sounds(sound: SoundSpec, count: int) -> Sequence[Sound]:
    """`count` sounds, at most `SOUNDS`: enough to compare arithmetic where there is no speech."""
    lengths = _SECONDS[: max(1, min(count, SOUNDS))]
    return [encoder_inputs(sound, sample_sound(sound, seconds, seed)) for seed, seconds in enumerate(lengths)]
