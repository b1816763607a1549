"""Text to token ids and back: one class over the `tokenizers` library, read from tokenizer.json or built from GGUF.

tokenizer.json, chat templates and GGUF vocabularies come from strangers: a defect is a one-line UserError, and templates run in
jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream as _LibraryStream

from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line, read_json_object, read_text

_MOST_IDS = 1 << 32  # the library's ids have 32 bits
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A tokenizer with the ids that start, end and pad a sequence.

    Args:
        backend: the library's tokenizer. Its truncation and padding are switched off.
        settings: the contents of tokenizer_config.json (bos_token, eos_token, pad_token, chat_template …).
        eos_ids: further ids that end generation, from generation_config.json or config.json.

    Attributes:
        bos_id, pad_id: the id, or None where the tokenizer has none.
        eos_ids: every id that ends generation.
        chat_template: jinja source, or None.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], eos_ids: Iterable[int] = ()) -> None:
        backend.no_truncation()  # tokenizer.json may have limits of the training, which would cut prompts
        backend.no_padding()
        self._backend = backend
        self._settings = dict(settings)
        self._named = {key: _token_text(settings.get(key)) for key in _NAMED}
        self.bos_id = self._id("bos_token")
        self.pad_id = self._id("pad_token")
        self.eos_ids = set(eos_ids) | ids_in(settings.get("eos_token_ids")) | ids_in(self._id("eos_token"))
        self.chat_template = _chat_template(settings.get("chat_template"))

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, a chat_template.jinja, and eos ids from the model's configs.

        Raises UserError if tokenizer.json is absent or any of them is corrupt.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{directory}: no tokenizer.json; where transformers is installed, "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it"
            )
        text = read_text(file, 256 * MEBIBYTE)
        backend = _read_backend(file, text)
        configs = {
            name: read_json_object(directory / name) if (directory / name).exists() else {}
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        }
        settings = configs["tokenizer_config.json"]
        template = directory / "chat_template.jinja"
        if template.exists():  # the newer layout: it overrides tokenizer_config.json
            settings["chat_template"] = read_text(template, MEBIBYTE)
        eos = ids_in(configs["generation_config.json"].get("eos_token_id"))
        return cls(backend, settings, eos | _config_eos(configs["config.json"]))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that a GGUF file's metadata describes. Raises UserError if it is of an unknown kind."""
        from .gguf_tokenizer import build

        backend, settings, eos_ids = build(metadata)
        return cls(backend, settings, eos_ids)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`. special: with the tokens that the post-processor adds (Gemma: bos; T5Gemma: eos).

        A text from `apply_chat` holds its special tokens already: encode it with special=False.
        """
        try:
            return list(self._backend.encode(text, add_special_tokens=special).ids)
        except (TypeError, UnicodeEncodeError):
            raise UserError(f"text {one_line(ascii(text), 60)} is not valid Unicode; remove lone surrogates") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens. Ids beyond the vocabulary are skipped."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of one token as the vocabulary spells it, or None."""
        return self._backend.token_to_id(token)

    def stream(self) -> DecodeStream:
        """A new incremental decoder, for one generated sequence."""
        return DecodeStream(self)

    def apply_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str | None:
        """The prompt that the chat template makes of `messages`, each {"role": …, "content": …}. None without a template.

        Raises UserError if the template is no valid jinja, refuses the messages, or fails on them.
        """
        if self.chat_template is None:
            return None
        names = {key: text or "" for key, text in self._named.items()}
        try:
            template = _environment().from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
        except TemplateError as error:
            raise UserError(f"the model's chat template: {one_line(error, 160)}; use a plain prompt instead") from None
        except Exception as error:  # a template can fail in any way Python can
            reason = f"{type(error).__name__}: {one_line(error, 120)}"
            raise UserError(
                f"the model's chat template fails on these messages ({reason}); use a plain prompt"
            ) from None

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into directory `path`; the latter has chat template and eos ids."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings}
        settings.update({key: text for key, text in self._named.items() if text is not None})
        settings["eos_token_ids"] = sorted(self.eos_ids)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        self._backend.save(str(directory / "tokenizer.json"))
        text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def _id(self, key: str) -> int | None:
        text = self._named[key]
        return None if text is None else self._backend.token_to_id(text)


class DecodeStream:
    """Text as tokens arrive: `put` each id, then `end`. The pieces joined are `decode` of all ids.

    A UTF-8 character that is not complete is held back until its other bytes come, or until `end`, which shows it as U+FFFD.
    Where byte tokens make no valid UTF-8, `decode` turns their whole run into U+FFFD; a stream keeps what it has returned.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._library = _LibraryStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._returned = 0  # how many ids the pieces stand for

    def put(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty."""
        self._ids.append(token_id)
        try:
            piece = self._library.step(self._tokenizer._backend, token_id) or ""
        except Exception:
            # "Invalid prefix": byte tokens have turned text that was returned into U+FFFD.
            piece = self._tokenizer.decode(self._ids[self._returned :])
            self._library = _LibraryStream([token_id], skip_special_tokens=True)
        if piece:
            self._pieces.append(piece)
            self._returned = len(self._ids)
        return piece

    def end(self) -> str:
        """What was held back: an incomplete character, or nothing. The last call."""
        returned, text = "".join(self._pieces), self._tokenizer.decode(self._ids)
        return (
            text[len(returned) :] if text.startswith(returned) else self._tokenizer.decode(self._ids[self._returned :])
        )


def _read_backend(file: Path, text: str) -> tokenizers.Tokenizer:
    """Parse tokenizer.json and encode a word with it: some defects show there first, as a panic of the Rust library."""
    try:
        backend = tokenizers.Tokenizer.from_str(text)
        backend.encode("a")
    except BaseException as error:
        # The library raises bare Exception. A panic is a BaseException whose class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{file}: not a tokenizer the tokenizers library reads ({one_line(error, 120)})") from None
    return backend


def ids_in(value: object) -> set[int]:
    """The ids in a config's eos_token_id: an int, a list of ints, or nothing."""
    values = value if isinstance(value, list) else [value]
    return {v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < _MOST_IDS}


def _config_eos(config: Mapping[str, Any]) -> set[int]:
    """eos ids of config.json: those at its top, else those of the part that generates text."""
    for part in (config, config.get("decoder"), config.get("text_config")):
        if isinstance(part, Mapping) and (ids := ids_in(part.get("eos_token_id"))):
            return ids
    return set()


def _token_text(value: object) -> str | None:
    """A token in tokenizer_config.json: a string, or an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(value: object) -> str | None:
    """The template itself, or of a list of named ones the default."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) and value else None


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks what a training scores. Its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """jinja as chat templates expect it: whitespace control, loop controls, and the functions that templates call."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
