"""How a speech model generates: its `SpeechSpec`, from the model, generation_config.json and the tokenizer."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any, Literal, cast

from ..bundle import SoundSpec, SpeechSpec
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..models.language_model import SoundLayout
from ..system.reading import shown

TOKENS_A_SECOND = 6.5
"""What a model that tells no times may say of a sound: the authors of Moonshine stop there, as a loop says more."""

_POSITION = 0.02
"""Seconds of a timestamp, by which `max_initial_timestamp_index` counts."""

_NO_TIMESTAMPS = "no_timestamps_token_id"
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_TASKS: tuple[Literal["transcribe", "translate"], ...] = ("transcribe", "translate")
_MOST = 1 << 16


def speech_of(
    layout: SoundLayout, checkpoint: Checkpoint, config: dict[str, Any], context: int, vocab: int
) -> SpeechSpec:
    """How a model that reads `layout` makes text of sound. context: positions that an encoder of samples may have.

    Raises UserError for values of generation_config.json that are none, and a context too short for any sound.
    """
    sound = _sound(layout, context)
    read = _Reader(checkpoint.generation, config, vocab)
    if sound.kind == "samples":
        return SpeechSpec(
            sound=sound,
            suppress=read.tokens("suppress_tokens"),
            begin_suppress=read.tokens("begin_suppress_tokens"),
            tokens_a_second=TOKENS_A_SECOND,
        )
    no_timestamps = read.token(_NO_TIMESTAMPS)
    if no_timestamps is None and checkpoint.tokenizer is not None:
        no_timestamps = checkpoint.tokenizer.token_id("<|notimestamps|>")
    several = read.values.get("is_multilingual") is not False
    index = read.number("max_initial_timestamp_index", 50)
    return SpeechSpec(
        sound=sound,
        suppress=read.tokens("suppress_tokens"),
        begin_suppress=read.tokens("begin_suppress_tokens"),
        no_timestamps=no_timestamps,
        languages=read.languages() if several else {},
        tasks=cast("dict[Literal['transcribe', 'translate'], int]", read.tasks() if several else {}),
        first_within=None if index is None else index * _POSITION,
    )


def default_language(speech: SpeechSpec) -> str | None:
    """The language that a bundle is compared in; None of a model that has no choice."""
    return None if not speech.languages else "en" if "en" in speech.languages else min(speech.languages)


def _sound(layout: SoundLayout, context: int) -> SoundSpec:
    """The layout with windows that fit the bundle's context."""
    values = asdict(layout)
    if layout.kind == "samples" and context < layout.positions:
        behind = -(-layout.tail // layout.row)
        if context <= behind:
            raise UserError(f"--max-context {context} is too short for a sound; give at least {behind + 1}")
        values |= {"positions": context, "window": layout.row * (context - behind) + layout.tail}
    return SoundSpec(**values)


class _Reader:
    """Keys of generation_config.json."""

    def __init__(self, generation: dict[str, Any], config: dict[str, Any], vocab: int) -> None:
        self.values, self._config, self._vocab = generation, config, vocab

    def tokens(self, key: str) -> tuple[int, ...]:
        """A list of ids; () where there is none. config.json counts where there is no other. Raises UserError."""
        value = (self.values or self._config).get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > _MOST or not all(self._is_token(v) for v in value):
            raise UserError(f"{key} is {shown(value, 80)}, expected a list of tokens below {self._vocab}")
        return tuple(value)

    def token(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is not None and not self._is_token(value):
            raise UserError(
                f"generation_config.json: {key} is {shown(value, 40)}, expected a token below {self._vocab}"
            )
        return cast("int | None", value)

    def number(self, key: str, default: int) -> int | None:
        """A count; None where the config says null."""
        value = self.values.get(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST):
            raise UserError(f"generation_config.json: {key} is {shown(value, 40)}, expected a number up to {_MOST}")
        return value

    def languages(self) -> dict[str, int]:
        """Code -> token, of `lang_to_id`, whose keys are such as <|en|>."""
        found = {}
        for name, token in self._table("lang_to_id").items():
            code = _LANGUAGE.fullmatch(name)
            if code is None:
                raise UserError(f"generation_config.json: lang_to_id has {shown(name, 40)}, expected such as '<|en|>'")
            found[code[1]] = token
        return found

    def tasks(self) -> dict[str, int]:
        table = self._table("task_to_id")
        return {name: table[name] for name in _TASKS if name in table}

    def _table(self, key: str) -> dict[str, int]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or len(value) > 1024 or not all(self._is_token(v) for v in value.values()):
            raise UserError(f"generation_config.json: {key} is {shown(value, 80)}, expected tokens by name")
        return value

    def _is_token(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self._vocab
