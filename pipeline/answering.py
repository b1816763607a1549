"""How an answer is drawn and where it ends, as the model's makers say it in three files, and where those are judged wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from ..bundle import SamplingSpec
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..system.reading import one_line, shown

Note = Callable[[str], None]

_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
}
_OF_A_DRAW = ("temperature", "top_p", "top_k", "min_p")
_TOP_K = 50  # transformers' own, where a config that draws does not say

_NOT_DONE: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "penalty_alpha": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "guidance_scale": (1.0,),
    "min_new_tokens": (0,),
    "min_length": (0,),
    "stop_strings": (),
}
"""Keys of generation_config.json that change an answer and are not heeded -> their values that change nothing."""

_SAID = "answer"
_ASKED = "question"


def sampling_of(generation: Mapping[str, Any], note: Note) -> SamplingSpec | None:
    """How generation_config.json has a token drawn; None: the best one. `note` gets a line of what is not heeded.

    Raises UserError for a value that means nothing.
    """
    ignored = [
        f"{key} {shown(value, 40)}"
        for key, neutral in _NOT_DONE.items()
        if (value := generation.get(key)) is not None and value not in neutral and value not in ([], {})
    ]
    if ignored:
        note(f"generation_config.json asks for {', '.join(ignored)}, which is not done here; answers may differ")
    draws = generation.get("do_sample") is True
    given = {ours: generation[key] for key, ours in _KEYS.items() if generation.get(key) is not None}
    if draws:
        given = {"temperature": 1.0, "top_k": _TOP_K} | given
    else:
        given = {name: value for name, value in given.items() if name not in _OF_A_DRAW}
    if not given:
        return None
    try:
        spec = SamplingSpec.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = next((k for k, ours in _KEYS.items() if ours in first["loc"]), "?")
        raise UserError(
            f"generation_config.json: {key} is {shown(generation.get(key), 40)} ({one_line(first['msg'], 80)}); mend it"
        ) from None
    return None if spec == SamplingSpec() else spec


def end_tokens(tokenizer: Tokenizer | None, given: set[int], note: Note) -> set[int]:
    """The ids that end an answer: those given, and the token with which the chat template closes the assistant's turn.

    `note` gets a line where one was missing, or where nothing ends an answer.
    """
    if tokenizer is None:
        return given
    closing = _closing_token(tokenizer)
    if closing is not None and closing[0] not in given:
        before = "none is named" if not given else f"it is not among the end tokens {sorted(given)[:8]}"
        note(f"the chat template ends a turn with {closing[1]} (token {closing[0]}); {before}, so it is one now")
        return given | {closing[0]}
    if not given:
        note("no end token is named (eos_token, eos_token_id): answers end at the limit of tokens, or at --stop")
    return given


def _closing_token(tokenizer: Tokenizer) -> tuple[int, str] | None:
    """The special token behind what the assistant said in a rendered chat, and how it is written; None if there is none."""
    chat = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]
    try:
        text = tokenizer.apply_chat(chat, add_generation_prompt=False)
        if text is None or text.count(_SAID) != 1:
            return None
        ids = tokenizer.encode(text[text.index(_SAID) + len(_SAID) :], special=False)
    except UserError:  # a template that takes no such chat; a prompt will show it
        return None
    for token in ids:
        if token in tokenizer.special_ids:
            return token, one_line(tokenizer.spelling(token), 40)
        if tokenizer.decode([token]).strip():
            return None  # words before a special token: the template does not close a turn so
    return None
