"""Tiny checkpoints and calibration samples."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

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


def samples_of(spec: Generation, count: int = 3) -> list[Sample]:
    """Of different lengths, so that padding is there; contexts of one length."""
    rng = random.Random(1)
    samples = []
    for i in range(count):
        tokens = tuple(rng.randrange(4, spec.vocab) for _ in range(9 - i))
        decoded = () if spec.decoder_start is None else (spec.decoder_start, *tokens[: 4 + i])
        context = tuple(rng.randrange(4, spec.context.vocab) for _ in range(7)) if spec.context is not None else ()
        samples.append(Sample(tokens, decoded if spec.task == "seq2seq" else (), context))
    return samples
