"""The `tokenizers` library on files of strangers: tokenizer.json is checked and loaded in parts, texts are encoded with a limit.

The library panics, loops and takes memory without end on what a file asks for, and it holds the interpreter's lock meanwhile, so
that Ctrl-C ends nothing. Only its batch call releases the lock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors
from tokenizers.models import Model

from ..errors import UserError
from ..system.quiet import quiet_stderr
from ..system.reading import MEBIBYTE, one_line, read_bytes
from ..system.time_limit import OutOfTime, within
from .tokenizer_checks import Limits, Unfit, check
from .tokenizer_settings import STANDARD, Settings
from .vocabularies.vocabulary import Vocabulary

ENCODE_SECONDS = 20.0
"""Time in which a text is encoded, and one more second for each 100 kB of what it may become."""

_DIRECT = 4096
"""Bytes of a text that may be encoded without a limit of time where no regular expression runs on it."""

_LARGEST_FILE = 256 * MEBIBYTE
_LARGEST_PARTS = 32 * MEBIBYTE  # all but the model, where the model comes last as the library writes it
_LARGEST_WHOLE = 64 * MEBIBYTE  # a file whose model does not
_TRIES = 16

_COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")
_NO_MODEL = {"type": "WordLevel", "vocab": {}, "unk_token": ""}


def read_backend(
    file: Path, added: Iterable[dict[str, Any]] = (), wanted: Iterable[dict[str, Any]] = (), normalize: bool = False
) -> tuple[tokenizers.Tokenizer, Limits]:
    """The library's tokenizer of a tokenizer.json, without its truncation and padding, and its limits.

    added: further entries of its added_tokens. wanted: those that are added only where none is written so. normalize: whether a
    text is brought to NFC where the file says nothing of a normalizer.

    Raises UserError if the library does not read it, or if it asks for what no tokenizer needs.
    """
    data = read_bytes(file, _LARGEST_FILE)
    with refusing(file):
        parts, model = _read_parts(data)
        if normalize and parts.get("normalizer") is None:
            parts["normalizer"] = {"type": "NFC"}
        return _checked(parts, model, added, wanted)


def backend_of(vocabulary: Vocabulary, settings: Settings) -> tuple[tokenizers.Tokenizer, Limits]:
    """The library's tokenizer of a vocabulary in other files, and its limits. Raises UserError as `read_backend` does."""
    with refusing(vocabulary.file):
        backend, limits = _checked(dict(vocabulary.parts), vocabulary.model, settings.added, settings.wanted)
        before, after = (
            [settings.named.get(key, key) for key in keys if key in settings.named or key not in STANDARD]
            for keys in (vocabulary.before, vocabulary.after)
        )
        put_around(backend, before, after)
        _call_encode(backend, limits, "a", True)
    return backend, limits


def put_around(backend: tokenizers.Tokenizer, before: list[str], after: list[str]) -> None:
    """Let `encode` put tokens before and behind a text. Raises Unfit for one that the vocabulary has not, or no template holds."""
    tokens = dict.fromkeys([*before, *after])
    for token in tokens:
        if backend.token_to_id(token) is None:
            raise Unfit(f"its token {one_line(token, 40)!r} that goes around a text is not in the vocabulary")
        if token.startswith("$") or ":" in token:
            # In a template "$A" is the text, and what follows a colon a type.
            raise Unfit(f"token {one_line(token, 40)!r} cannot be put around a text")
    if tokens:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(token, backend.token_to_id(token)) for token in tokens]
        )


def _checked(
    parts: dict[str, Any], model: Model, added: Iterable[dict[str, Any]], wanted: Iterable[dict[str, Any]]
) -> tuple[tokenizers.Tokenizer, Limits]:
    parts["added_tokens"] = _with_tokens(parts.get("added_tokens"), added, wanted)
    limits = check(parts)
    backend = _build(parts, model, limits)
    _call_encode(backend, limits, "a", True)  # some defects show with the first text
    return backend, limits


@contextmanager
def refusing(file: Path) -> Iterator[None]:
    """What a file asks for that no tokenizer needs, or that the library raises for it, becomes one line."""
    try:
        with quiet_stderr():  # a panic prints there too
            yield
    except Unfit as error:
        raise UserError(f"{file}: a tokenizer that is not loaded here: {error}") from None
    except OutOfTime:
        raise UserError(f"{file}: a tokenizer that is not loaded here: it takes too long on its own tokens") from None
    except BaseException as error:
        if not from_library(error):
            raise
        raise UserError(f"{file}: not a tokenizer the tokenizers library reads ({one_line(error, 120)})") from None


def encode(backend: tokenizers.Tokenizer, limits: Limits, text: str, special: bool) -> list[int]:
    """Token ids of `text`. Raises UserError if it is too long, no Unicode, takes too much time, or the library fails on it."""
    try:
        return _call_encode(backend, limits, text, special)
    except OutOfTime:
        raise UserError(
            f"the tokenizer takes too long on a text of {len(text)} characters; is its file from a source you trust?"
        ) from None
    except (TypeError, UnicodeEncodeError):
        raise UserError(f"text {one_line(ascii(text), 60)} is not valid Unicode; remove lone surrogates") from None
    except BaseException as error:
        if not from_library(error):
            raise
        raise UserError(
            f"the tokenizer fails on text {one_line(ascii(text), 60)} ({one_line(error, 120)}); is its file whole?"
        ) from None


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """What the library raises within this context, panics included, becomes a UserError: the tokenizer fails on `what`."""
    try:
        yield
    except BaseException as error:
        if not from_library(error):
            raise
        raise UserError(f"the tokenizer fails on {what} ({one_line(error, 120)}); is its file whole?") from None


def from_library(error: BaseException) -> bool:
    """Whether the library may have raised this: any Exception, or a panic, a BaseException whose class cannot be imported."""
    if isinstance(error, Exception):
        return not isinstance(error, UserError | OSError | MemoryError)
    return type(error).__name__ == "PanicException"


def _call_encode(backend: tokenizers.Tokenizer, limits: Limits, text: str, special: bool) -> list[int]:
    size = limits.grown(text)
    if size <= _DIRECT and not limits.regex:
        return list(backend.encode(text, add_special_tokens=special).ids)
    seconds = ENCODE_SECONDS + size / 1e5
    # The batch call alone releases the interpreter's lock.
    return within(seconds, lambda: list(backend.encode_batch([text], add_special_tokens=special)[0].ids))


def _read_parts(data: bytes) -> tuple[dict[str, Any], Model]:
    """All but the model, and the model. Gemma's has 30 MB, so Python does not parse it where it comes last."""
    found = _before_model(data)
    if found is not None:
        try:
            return found[0], _model(data[found[1] : data.rindex(b"}")])
        except Exception:  # more parts follow the model, or it is broken: the whole file tells
            pass
    if len(data) > _LARGEST_WHOLE:
        raise Unfit(f"of {len(data)} bytes, and its model is not the last of its parts")
    parts = json.loads(data.decode())
    if not isinstance(parts, dict) or "model" not in parts:
        raise ValueError("no object with a model")
    return parts, _model(json.dumps(parts.pop("model")).encode())


def _before_model(data: bytes) -> tuple[dict[str, Any], int] | None:
    """The parts before the model, and where the model's value begins; None if that cannot be told."""
    at = 0
    for _ in range(_TRIES):  # a token may be called so too
        at = data.find(b'"model"', at + 1, _LARGEST_PARTS)
        colon = _COLON.match(data, at + len(b'"model"'))
        if at < 0 or colon is None:
            return None
        before = data[:at].rstrip()
        if before.endswith((b",", b"{")):
            try:  # only where the object has not been left, and nothing in it begun, does this make it whole
                return json.loads(before.removesuffix(b",").decode() + "}"), colon.end()
            except ValueError:
                continue
    return None


def _with_tokens(tokens: Any, added: Iterable[dict[str, Any]], wanted: Iterable[dict[str, Any]]) -> Any:
    """tokenizer.json's list of added tokens with those that other files give."""
    if not isinstance(tokens or [], list):
        return tokens  # the library refuses it
    whole = [*(tokens or []), *added]
    present = {token.get("content") for token in whole if isinstance(token, dict)}
    for token in wanted:
        if token["content"] not in present:
            present.add(token["content"])
            whole.append(token)
    return whole


def _model(model: bytes) -> Model:
    """A model from its JSON, which must be one value."""
    made = Model()
    made.__setstate__(model)
    return made


def _build(parts: dict[str, Any], model: Model, limits: Limits) -> tokenizers.Tokenizer:
    """The tokenizer, as the library loads it from a whole file, of the parts that were checked."""
    kept = {key: value for key, value in parts.items() if key not in ("added_tokens", "truncation", "padding")}
    backend = tokenizers.Tokenizer.from_str(json.dumps({**kept, "added_tokens": [], "model": _NO_MODEL}))
    backend.model = model
    added = [
        tokenizers.AddedToken(
            token["content"],
            **{key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special")},
        )
        for token in parts.get("added_tokens") or []
    ]
    if limits.slow_load:
        _try_normalizer(backend, [token.content for token in added if token.normalized])
    backend.add_tokens(added)
    return backend


def _try_normalizer(backend: tokenizers.Tokenizer, texts: list[str]) -> None:
    """Normalize them where a limit holds: `add_tokens` does it while it holds the interpreter's lock."""

    def run() -> None:
        for text in texts:
            try:
                backend.encode_batch([text])
            except BaseException as error:  # a token that the vocabulary cannot spell is no defect
                if not from_library(error):
                    raise

    within(ENCODE_SECONDS, run)
