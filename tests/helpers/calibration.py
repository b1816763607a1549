"""Tiny checkpoints and calibration samples."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.audio.features import encoder_inputs, sample_sound
from edgewright.bundle import Generation
from edgewright.calibration.samples import Sample
from edgewright.calibration.source import Source
from edgewright.pipeline.plan import plan
from helpers import tiny
from helpers.family_table import CONFIGS
from helpers.requests import asking


def opened(family: str, folder: Path, **changes: object) -> Source:
    """The tiny model of a family, without data. changes: of its config."""
    path = tiny.write(folder / "model", tiny.merged(CONFIGS[family], changes))
    source = plan(asking(str(path), bits=6.0, max_context=48)).source
    return replace(source, calls=())


def heard(spec: Generation, seed: int) -> dict[str, Any]:
    """What a sample of a speech model has in place of tokens: a made-up sound, one a seed, of different lengths."""
    assert spec.speech is not None
    sound = spec.speech.sound
    inputs = encoder_inputs(sound, sample_sound(sound, 0.3 - 0.04 * (seed % 5), seed))
    return {"tokens": (), "sound": inputs, "heard": inputs.get("encoder_mask", np.ones((1, sound.positions))).shape[1]}


def samples_of(spec: Generation, count: int = 3) -> list[Sample]:
    """Of different lengths, so that padding is there; contexts of one length."""
    rng = random.Random(1)
    samples = []
    for i in range(count):
        tokens = tuple(rng.randrange(4, spec.vocab) for _ in range(9 - i))
        # parts are made of the longest samples first, which are the first ones here
        fed = tokens[: 4 + i] if spec.speech is None else tokens[: max(1, 6 - i)]
        decoded = () if spec.decoder_start is None else (spec.decoder_start, *fed)
        context = tuple(rng.randrange(4, spec.context.vocab) for _ in range(7)) if spec.context is not None else ()
        sample = Sample(tokens, decoded if spec.task == "seq2seq" else (), context)
        samples.append(sample if spec.speech is None else replace(sample, **heard(spec, i)))
    return samples
