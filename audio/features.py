"""Samples as what a speech encoder reads: a log-mel spectrogram, or rows of samples."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import SoundSpec
from .files import Samples

Array = NDArray[Any]

_FLOOR = 1e-10
_RANGE = 8.0
"""Of a spectrogram: the least energy, and the powers of ten that it spans below its largest."""


def encoder_inputs(sound: SoundSpec, samples: Samples) -> dict[str, Array]:
    """The inputs of the graph `encoder` for samples [n] of at most a window, one row of a batch."""
    samples = samples[: sound.window]
    if sound.kind == "log-mel":
        return {sound.port: log_mel(sound, samples)[None]}
    rows, real = sound.rows(len(samples)), sound.real_rows(len(samples))
    filled = np.zeros(rows * sound.row, np.float32)
    filled[: len(samples)] = samples
    return {sound.port: filled.reshape(1, rows, sound.row), "encoder_mask": (np.arange(rows) < real)[None]}


def log_mel(sound: SoundSpec, samples: Samples) -> NDArray[np.float32]:
    """The log-mel spectrogram [mels, frames] of a window, as Whisper's: samples [n] with silence behind them.

    Frames are centred, their ends mirrored; powers of a Hann window; logarithms of ten, from 8 below the largest on, scaled by a
    quarter.
    """
    filled = np.zeros(sound.window)
    filled[: len(samples)] = samples[: sound.window]
    mirrored = np.pad(filled, sound.fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(mirrored, sound.fft)[:: sound.hop][: sound.window // sound.hop]
    window = np.hanning(sound.fft + 1)[:-1]  # the periodic one
    powers = np.abs(np.fft.rfft(frames * window)) ** 2
    energies = np.log10(np.maximum(powers @ mel_filters(sound.rate, sound.fft, sound.mels), _FLOOR))
    energies = np.maximum(energies, energies.max() - _RANGE)
    return np.ascontiguousarray(((energies + 4.0) / 4.0).T, np.float32)


@cache
def mel_filters(rate: int, fft: int, mels: int) -> NDArray[np.float64]:
    """Triangles [fft / 2 + 1, mels] of equal area, evenly apart on Slaney's mel scale up to 8 kHz or half the rate."""
    tones = np.linspace(0.0, rate / 2, fft // 2 + 1)
    corners = _hertz(np.linspace(0.0, _mel(min(8000.0, rate / 2)), mels + 2))
    widths = np.diff(corners)
    apart = corners[None, :] - tones[:, None]
    triangles = np.maximum(0.0, np.minimum(-apart[:, :-2] / widths[:-1], apart[:, 2:] / widths[1:]))
    filters: NDArray[np.float64] = triangles * 2.0 / (corners[2:] - corners[:-2])
    return filters


_LINEAR, _BREAK = 200.0 / 3.0, 1000.0
_STEP = np.log(6.4) / 27.0
"""Slaney's scale: hertz of a mel up to 1 kHz; from there on logarithms, in such steps."""


def _mel(hertz: float) -> float:
    if hertz < _BREAK:
        return hertz / _LINEAR
    return float(_BREAK / _LINEAR + np.log(hertz / _BREAK) / _STEP)


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    above = mels - _BREAK / _LINEAR
    scale: NDArray[np.float64] = np.where(above < 0.0, mels * _LINEAR, _BREAK * np.exp(_STEP * np.maximum(above, 0.0)))
    return scale


def sample_sound(sound: SoundSpec, seconds: float, seed: int) -> Samples:
    """A made-up sound with a voice's build: a pitch that glides, its overtones, syllables, noise. The same seed gives the same."""
    rng = np.random.default_rng(seed)
    count = max(1, int(min(seconds, sound.seconds) * sound.rate))
    time = np.arange(count) / sound.rate
    pitch = rng.uniform(90, 220) * (1.0 + 0.2 * np.sin(2 * np.pi * rng.uniform(0.3, 1.0) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / sound.rate
    voice = sum(rng.uniform(0.2, 1.0) / n * np.sin(n * phase) for n in range(1, 12))
    syllables = np.clip(np.sin(2 * np.pi * rng.uniform(2.0, 5.0) * time), 0.0, 1.0)
    noise = rng.normal(0.0, 0.01, count)
    made: Samples = (0.2 * voice * syllables + noise).astype(np.float32)
    return made
