"""Sound files as samples: one channel at the rate that a model wants."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..system.reading import one_line, open_regular

Samples = NDArray[np.float32]
"""One channel, [n], a sine of full scale from -1 to 1."""

MOST_BYTES = 1 << 30
MOST_SECONDS = 2 * 3600
MOST_SAMPLES = 1 << 29
"""Of a file: its bytes, its seconds, and its samples of all channels."""

LOUDEST = 1e3
"""No sound has larger samples, which are 1 at full scale."""

_BLOCK = 1 << 20
_RATES = 1000, 384_000
_CHANNELS = 64


def read_sound(path: Path, rate: int) -> Samples:
    """The sound in `path`, the mean of its channels, at `rate` samples a second.

    Formats are those of libsndfile: WAV, FLAC, Ogg, MP3 and others. Raises UserError for a file that is none, is too large or too
    long, holds no sound or samples that are no numbers, or where soundfile is not installed.
    """
    soundfile = _library()
    with open_regular(path, MOST_BYTES) as file:
        try:
            with soundfile.SoundFile(file) as sound:
                _check(path, sound)
                found = int(sound.samplerate)
                blocks = [block.mean(1) for block in sound.blocks(_BLOCK, dtype="float32", always_2d=True)]
        except UserError:
            raise
        except Exception as error:  # libsndfile's own, and what its callbacks meet in a damaged file
            raise UserError(
                f"{one_line(path)}: no sound that can be read ({one_line(error, 100)}); give WAV, FLAC, Ogg or MP3"
            ) from None
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return resampled(checked(samples, one_line(path)), found, rate)


def checked(samples: NDArray[Any], whose: str) -> Samples:
    """Samples of one channel as float32. Raises UserError, whose line begins with `whose`, for none, or what is no sound."""
    values = np.asarray(samples)
    if values.ndim != 1 or values.dtype.kind != "f":
        raise UserError(f"{whose}: samples are floats of one channel, [n]; this is {values.dtype} {list(values.shape)}")
    if not len(values):
        raise UserError(f"{whose}: there is no sound in it")
    if not np.abs(values).max() <= LOUDEST:  # also not a number
        raise UserError(f"{whose}: samples that are no numbers or above {LOUDEST:g}, where full scale is 1")
    return values.astype(np.float32, copy=False)


def resampled(samples: Samples, found: int, rate: int) -> Samples:
    """The samples at another rate, by a polyphase filter."""
    if found == rate:
        return samples
    from scipy.signal import resample_poly  # here, as its import is slow

    common = gcd(found, rate)
    up, down = rate // common, found // common
    made: Samples = np.asarray(resample_poly(samples, up, down), np.float32)
    return made


def _library() -> Any:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: its libsndfile is missing
        raise UserError("reading a sound needs soundfile: pip install 'edgewright[audio]'") from None
    return soundfile


def _check(path: Path, sound: Any) -> None:
    """Raise UserError for sizes that are not those of speech, before anything is read by them."""
    rate, channels, frames = int(sound.samplerate), int(sound.channels), int(sound.frames)
    if not _RATES[0] <= rate <= _RATES[1] or not 1 <= channels <= _CHANNELS:
        raise UserError(
            f"{one_line(path)}: {channels} channels of {rate} samples a second; {_RATES[0]} to {_RATES[1]} and at most "
            f"{_CHANNELS} channels are read"
        )
    if frames > MOST_SECONDS * rate or frames * channels > MOST_SAMPLES:
        raise UserError(
            f"{one_line(path)}: a sound of {frames / rate:.0f} s in {channels} channels is longer than is read at once; cut it"
        )
