"""What an encoder-decoder's encoder reads of prompts: token ids, or what `audio` makes of sounds. No torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..bundle import Generation, SoundSpec, require_tokens
from ..errors import UserError
from .session import Array

Prompt = Sequence[int] | Mapping[str, Array]
"""Token ids; for a model that reads sound the inputs of its encoder by name, one row (`audio.features.encoder_inputs`)."""


def encoder_batch(spec: Generation, prompts: Sequence[Prompt]) -> tuple[dict[str, Array], Array]:
    """The inputs of the graph `encoder` for prompts side by side, and where its output is real: bool [batch, source].

    Raises UserError for a prompt that is empty, too long, not of the kind that the model reads, or has tokens the model does not.
    """
    if spec.speech is not None:
        return _sounds(spec.speech.sound, prompts)
    texts = [token_prompt(prompt) for prompt in prompts]
    longest = max(map(len, texts), default=0)
    if longest > spec.max_context:
        raise UserError(f"the prompt has {longest} tokens, the model reads at most {spec.max_context}")
    ids = np.full((len(texts), longest), spec.pad_id, np.int64)
    mask = np.zeros((len(texts), longest), bool)
    for row, text in enumerate(texts):
        require_tokens(text, spec.vocab, "the prompt")
        ids[row, : len(text)], mask[row, : len(text)] = text, True
    return {"input_ids": ids, "encoder_mask": mask}, mask


def token_prompt(prompt: Prompt) -> Sequence[int]:
    """A prompt that must be token ids. Raises UserError for a sound."""
    if isinstance(prompt, Mapping):
        raise UserError("the prompt is a sound, and this model reads text")
    return prompt


def _sounds(sound: SoundSpec, prompts: Sequence[Prompt]) -> tuple[dict[str, Array], Array]:
    names = [sound.port] if sound.kind == "log-mel" else [sound.port, "encoder_mask"]
    rows: list[Mapping[str, Array]] = []
    for prompt in prompts:
        if not isinstance(prompt, Mapping):
            raise UserError("this model reads sound, not text: give a sound file")
        found = {name: (value.dtype, value.shape) for name, value in prompt.items()}
        length = (
            found[sound.port][1][1] if sound.kind == "samples" and len(found.get(sound.port, ((), ()))[1]) == 3 else 0
        )
        if found != _wanted(sound, length):
            raise UserError(f"a sound's inputs are {', '.join(names)} of this model's sizes, one row of each")
        rows.append(prompt)
    if sound.kind == "log-mel":
        batch = {sound.port: np.concatenate([r[sound.port] for r in rows])}
        return batch, np.ones((len(rows), sound.positions), bool)
    longest = max(r[sound.port].shape[1] for r in rows)
    if longest > sound.positions:
        raise UserError(f"a sound of {longest} positions, the model reads at most {sound.positions}; cut it")
    batch = {name: np.concatenate([_longer(r[name], longest) for r in rows]) for name in names}
    return batch, batch["encoder_mask"]


def _wanted(sound: SoundSpec, rows: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of each input of one sound; rows: of samples."""
    floats = np.dtype(np.float32)
    if sound.kind == "log-mel":
        return {sound.port: (floats, (1, sound.mels, sound.window // sound.hop))}
    return {sound.port: (floats, (1, rows, sound.row)), "encoder_mask": (np.dtype(bool), (1, rows))}


def _longer(value: Array, length: int) -> Array:
    """[1, n, …] with zeros behind, [1, length, …]."""
    return np.pad(value, [(0, 0), (0, length - value.shape[1]), *[(0, 0)] * (value.ndim - 2)])
