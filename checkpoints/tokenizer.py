"""Text to token ids and back: one class over the `tokenizers` library, read from tokenizer.json or built from GGUF.

tokenizer.json, chat templates and GGUF vocabularies come from strangers: a defect is a one-line UserError, what they ask for is
bounded (`tokenizer_checks.py`), and templates run in a process of their own (`chat_template.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream as _LibraryStream

from ..errors import UserError
from ..system.reading import MEBIBYTE, read_json_object, read_text
from .chat_template import ChatTemplate
from .tokenizer_backend import encode, from_library, library_errors, read_backend
from .tokenizer_checks import MOST_BYTES, MOST_TOKENS, Limits

_MOST_IDS = 1 << 32  # the library's ids have 32 bits
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A tokenizer with the ids that start, end and pad a sequence.

    Args:
        backend: the library's tokenizer. Its truncation and padding are switched off.
        settings: the contents of tokenizer_config.json (bos_token, eos_token, pad_token, chat_template …).
        eos_ids: further ids that end generation, from generation_config.json or config.json.
        limits: what the backend may make of texts.
        template: the settings' chat template, where its process has been started already.

    Attributes:
        bos_id, pad_id: the id, or None where the tokenizer has none.
        eos_ids: every id that ends generation.
        chat_template: jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        eos_ids: Iterable[int],
        limits: Limits,
        template: ChatTemplate | None = None,
    ) -> None:
        backend.no_truncation()  # tokenizer.json may have limits of the training, which would cut prompts
        backend.no_padding()
        self._backend, self._limits = backend, limits
        self._settings = dict(settings)
        self._named = {key: _token_text(settings.get(key)) for key in _NAMED}
        self.bos_id = self._id("bos_token")
        self.pad_id = self._id("pad_token")
        self.eos_ids = set(eos_ids) | ids_in(settings.get("eos_token_ids")) | ids_in(self._id("eos_token"))
        self._template = template or _template_of(settings)
        self.chat_template = None if self._template is None else self._template.source

    @classmethod
    def from_dir(cls, path: str | Path, chat: bool = False) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, a chat_template.jinja, and eos ids from the model's configs.

        chat: whether a prompt will go through the chat template; its process starts while the rest is read. Raises UserError if
        tokenizer.json is absent or any of them is corrupt.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{directory}: no tokenizer.json; where transformers is installed, "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it"
            )
        configs = {
            name: read_json_object(directory / name) if (directory / name).exists() else {}
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        }
        settings = configs["tokenizer_config.json"]
        template = directory / "chat_template.jinja"
        if template.exists():  # the newer layout: it overrides tokenizer_config.json
            settings["chat_template"] = read_text(template, MEBIBYTE)
        source = _template_of(settings)
        if source is not None and chat:
            source.start()
        eos = ids_in(configs["generation_config.json"].get("eos_token_id"))
        backend, limits = read_backend(file)
        return cls(backend, settings, eos | _config_eos(configs["config.json"]), limits, source)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that a GGUF file's metadata describes. Raises UserError if it is of an unknown kind."""
        from .gguf_tokenizer import build

        return cls(*build(metadata))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`. special: with the tokens that the post-processor adds (Gemma: bos; T5Gemma: eos).

        A text from `apply_chat` holds its special tokens already: encode it with special=False. Raises UserError for a text that
        is no Unicode, that becomes too long or takes too long, or that the library fails on.
        """
        return encode(self._backend, self._limits, text, special)

    def special_tokens(self) -> tuple[list[int], list[int]]:
        """The ids that it puts before and after a text, each maybe none (Gemma: bos before; T5Gemma: eos after)."""
        plain, special = self.encode("a", special=False), self.encode("a")
        for at in range(len(special) - len(plain) + 1):
            if plain and special[at : at + len(plain)] == plain:
                return special[:at], special[at + len(plain) :]
        return [], []

    def encode_within(self, text: str, most: int) -> tuple[list[int], int]:
        """`encode` cut to `most` ids, the special tokens at both ends kept, and how many were cut off."""
        ids = self.encode(text)
        if len(ids) <= most:
            return ids, 0
        before, after = self.special_tokens()
        room = max(0, most - len(before) - len(after))
        inner = ids[len(before) : len(ids) - len(after)]
        return [*before, *inner[:room], *after][:most], len(inner) - room

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens. Ids beyond the vocabulary are skipped. Raises UserError if the library fails."""
        with library_errors("tokens"):
            self.require_decodable(self.characters(ids))
            return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of one token as the vocabulary spells it, or None."""
        with library_errors(f"token {ascii(token)[:40]}"):
            return self._backend.token_to_id(token)

    def stream(self) -> DecodeStream:
        """A new incremental decoder, for one generated sequence."""
        return DecodeStream(self)

    def apply_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str | None:
        """The prompt that the chat template makes of `messages`, each {"role": …, "content": …}. None without a template.

        Raises UserError if the template is no valid jinja, refuses the messages, fails on them, or takes too much.
        """
        if self._template is None:
            return None
        names = {key: text or "" for key, text in self._named.items()}
        return self._template.render(messages, add_generation_prompt, names)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into directory `path`; the latter has chat template and eos ids.

        Raises UserError for ids so high that the library, which counts up to them, would not end.
        """
        highest = max(self._backend.get_vocab(with_added_tokens=True).values(), default=0)
        if highest >= MOST_TOKENS:
            raise UserError(
                f"the tokenizer has a token with id {highest}, ids below {MOST_TOKENS} are saved; is it whole?"
            )
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings}
        settings.update({key: text for key, text in self._named.items() if text is not None})
        settings["eos_token_ids"] = sorted(self.eos_ids)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        text = _json(settings)
        with library_errors("being saved"):
            self._backend.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def _id(self, key: str) -> int | None:
        text = self._named[key]
        return None if text is None else self.token_id(text)

    def characters(self, ids: Iterable[int]) -> int:
        """How many characters the vocabulary's spellings of `ids` have; one may have 100 million."""
        with library_errors("tokens"):
            return sum(len(self._backend.id_to_token(i) or "") for i in ids)

    def require_decodable(self, characters: int) -> None:
        """Raise UserError for more `characters` of tokens than any answer has."""
        if characters * self._limits.decoded > MOST_BYTES // 4:
            raise UserError(
                f"the tokenizer makes {characters} characters of few tokens; is its file from a trusted source?"
            )


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
        self._characters = 0

    def put(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty. Raises UserError as `decode` does."""
        self._ids.append(token_id)
        self._characters += self._tokenizer.characters([token_id])
        self._tokenizer.require_decodable(self._characters)
        try:
            piece = self._library.step(self._tokenizer._backend, token_id) or ""
        except BaseException as error:
            if not from_library(error):
                raise
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


def _template_of(settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template itself, or of a list of named ones the default."""
    value = settings.get("chat_template")
    if isinstance(value, list):
        default = [e.get("template") for e in value if isinstance(e, Mapping) and e.get("name") == "default"]
        value = default[-1] if default else None
    return ChatTemplate(value) if isinstance(value, str) and value else None


def _json(settings: Mapping[str, Any]) -> str:
    """Settings as JSON, readable where they are Unicode. Raises UserError if they are too deep for that."""
    try:
        text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True)
        return text if _is_unicode(text) else json.dumps(settings, indent=2, sort_keys=True)
    except RecursionError:
        raise UserError("tokenizer_config.json has values within values, too deep to be written again") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
